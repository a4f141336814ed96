"""Continuous batching: which tokens of which sequences the next step computes.

There is no prefill phase and no decode phase: a step moves num_computed_tokens towards len(token_ids). A sequence one
token behind is decoding, one further behind is being prefilled, a preempted one is far behind again.
Membership in `waiting` or `running` is the status. Pure Python; knows neither tensors nor text nor clocks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from gptq_api.scheduler.blocks import BlockManager, block_hash
from gptq_api.sequence import Batch, Sampled, Sequence
from gptq_api.types import FinishReason


@dataclass(slots=True)
class Counters:
    """Running totals since start."""

    preemptions: int = 0
    prefix_queries: int = 0
    """prompt tokens looked up in the prefix cache"""
    prefix_hits: int = 0
    """prompt tokens found there"""


class Scheduler:
    """`add`, `abort`, and per step `schedule` (decide) and `update` (digest).

    max_num_seqs: sequences in one step; max_num_batched_tokens: tokens in one step.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first; the youngest is preempted first
        self.counters = Counters()

    def fits(self, seq: Sequence) -> bool:
        """Whether the sequence could ever finish, alone in the cache. Admission refuses the others."""
        longest = seq.num_prompt_tokens + seq.params.max_tokens
        return seq.num_prompt_tokens > 0 and longest <= self.blocks.num_blocks * self.blocks.block_size

    def add(self, seq: Sequence) -> None:
        if not self.fits(seq):
            raise ValueError(f"sequence {seq.sequence_id} can never fit into the KV cache; admission has to refuse it")
        self.waiting.append(seq)

    def abort(self, sequence_id: int) -> None:
        """Forget a sequence, wherever it is; unknown ids (already finished) are ignored."""
        for queue in (self.running, self.waiting):
            for seq in queue:
                if seq.sequence_id == sequence_id:
                    queue.remove(seq)
                    self.blocks.release(seq.block_table)
                    return

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> Batch:
        """Choose the tokens of one step; at least one whenever there is work."""
        taken: dict[Sequence, int] = {}
        budget = self.max_num_batched_tokens
        preempted: set[Sequence] = set()
        # Running before waiting: a token owed beats a token promised. A prompt in chunks takes whatever budget it
        # finds, so nobody is admitted behind it until it is done, and those who decode all stand before it.
        for seq in self.running.copy():
            if budget == 0:
                break
            if seq in preempted:
                continue
            n = min(seq.num_pending_tokens, budget)
            while not self.blocks.grow(seq.block_table, seq.num_computed_tokens + n):
                victim = self.preempt_youngest()
                preempted.add(victim)
                budget += taken.pop(victim, 0)
                if victim is seq:
                    break
            else:
                taken[seq] = n
                budget -= n
        for seq, n in taken.items():
            self._register(seq, n)  # only now: until here any of them could still be preempted

        while self.waiting and not preempted and budget and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            num_cached = self._share_prefix(seq)
            n = min(len(seq.token_ids) - num_cached, budget)
            # One spare block per running sequence, or we would preempt in the very next steps.
            if not self.blocks.grow(seq.block_table, num_cached + n, keep_free=len(self.running)):
                self.blocks.release(seq.block_table)
                break
            self.running.append(self.waiting.popleft())
            seq.num_computed_tokens = num_cached
            if seq.num_cached_tokens is None:
                seq.num_cached_tokens = num_cached
                self.counters.prefix_queries += seq.num_prompt_tokens
                self.counters.prefix_hits += num_cached
            taken[seq] = n
            budget -= n
            self._register(seq, n)
        return Batch(list(taken), list(taken.values()))

    def preempt_youngest(self) -> Sequence:
        """Take the youngest running sequence's memory; what it has so far becomes a longer prompt."""
        seq = self.running.pop()
        self.blocks.release(seq.block_table)
        seq.num_computed_tokens = 0
        self.waiting.appendleft(seq)
        self.counters.preemptions += 1
        return seq

    def update(self, batch: Batch, sampled: Sampled) -> dict[Sequence, FinishReason]:
        """Take in the result of a step; returns the sequences that are done, which hold no memory any more."""
        finished: dict[Sequence, FinishReason] = {}
        for seq, n, token in zip(batch.sequences, batch.num_new_tokens, sampled.tokens, strict=True):
            seq.num_computed_tokens += n
            if token is None:
                continue
            if token < 0:
                finished[seq] = "error"
                self.blocks.discard(seq.block_table)
            else:
                seq.token_ids.append(token)
                if token in seq.params.stop_token_ids:
                    finished[seq] = "stop"
                elif seq.num_output_tokens >= seq.params.max_tokens:
                    finished[seq] = "length"
        if finished:
            self.running = [seq for seq in self.running if seq not in finished]
            for seq in finished:
                self.blocks.release(seq.block_table)
        return finished

    def _share_prefix(self, seq: Sequence) -> int:
        """Give a sequence without blocks the longest prefix the cache holds; returns its length in tokens.

        At least one token is left to compute, because only computing it yields logits.
        """
        if not self.enable_prefix_caching:
            return 0
        num_usable = (len(seq.token_ids) - 1) // self.blocks.block_size
        self._hash_blocks(seq, num_usable)
        return self.blocks.share(seq.block_table, seq.block_hashes[:num_usable]) * self.blocks.block_size

    def _register(self, seq: Sequence, num_new_tokens: int) -> None:
        """Let others find the blocks that are full once this step has run.

        A sequence scheduled later into the same step may already share them: in every layer the step writes all its
        K/V before attention reads any.
        """
        if not self.enable_prefix_caching:
            return
        size = self.blocks.block_size
        first, last = seq.num_computed_tokens // size, (seq.num_computed_tokens + num_new_tokens) // size
        if last > first:
            self._hash_blocks(seq, last)
            for i in range(first, last):
                self.blocks.register(seq.block_table[i], seq.block_hashes[i])

    def _hash_blocks(self, seq: Sequence, num_blocks: int) -> None:
        """Extend seq.block_hashes to its first `num_blocks` blocks."""
        size, hashes = self.blocks.block_size, seq.block_hashes
        for i in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else seq.cache_salt
            hashes.append(block_hash(parent, seq.token_ids[i * size : (i + 1) * size]))
