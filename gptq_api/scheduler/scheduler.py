"""Continuous batching: which tokens of which sequences the next step computes.

There is no prefill phase and no decode phase: a step moves num_computed_tokens towards len(token_ids). A sequence one
token behind is decoding, one further behind is being prefilled, a preempted one is far behind again.
Membership in `waiting` or `running` is the status. Pure Python; knows neither tensors nor text nor clocks.

A step may be scheduled before the tokens of the one before it are known. Then a sequence has a token in flight: one
more to compute, without a value here. It costs one surplus step where that token turns out to be a stop token; a
sequence that reaches max_tokens is known beforehand. Blocks and slots are given back at once, whatever is in flight:
steps run in the order in which they are scheduled, so the next owner writes after the last one read.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass

from gptq_api.scheduler.blocks import BlockManager, block_hash
from gptq_api.sequence import Batch, Sampled, Sequence
from gptq_api.types import FinishReason

MANY_TILES = 4
"""so many, and a rounding to whole ones changes little in what a step takes"""


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

    max_num_seqs: sequences in one step; max_num_batched_tokens: tokens in one step; row_multiple: what their number is
    best a multiple of, where they are many.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
        row_multiple: int = 1,
    ) -> None:
        self.blocks, self._row_multiple = blocks, row_multiple
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first; the youngest is preempted first
        self._live: dict[int, Sequence] = {}
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._budget = max_num_batched_tokens  # less for a while after the device had no memory for a step
        self.counters = Counters()

    def fits(self, seq: Sequence) -> bool:
        """Whether the sequence could ever finish, alone in the cache. Admission refuses the others."""
        longest = seq.num_prompt_tokens + seq.params.max_tokens
        return seq.num_prompt_tokens > 0 and longest <= self.blocks.num_blocks * self.blocks.block_size

    def add(self, seq: Sequence) -> None:
        if not self.fits(seq):
            raise ValueError(f"sequence {seq.sequence_id} can never fit into the KV cache; admission has to refuse it")
        self.waiting.append(seq)
        self._live[seq.sequence_id] = seq

    def __contains__(self, seq: Sequence) -> bool:
        """Whether it is waiting or running still, and not finished or aborted while its token was in flight."""
        return self._live.get(seq.sequence_id) is seq

    def abort(self, sequence_id: int) -> None:
        """Forget a sequence, wherever it is; unknown ids (already finished) are ignored."""
        seq = self._live.pop(sequence_id, None)
        if seq is not None:
            (self.waiting if seq.slot < 0 else self.running).remove(seq)
            self._give_back(seq)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> Batch:
        """Choose the tokens of one step, which counts as computed from here on; at least one whenever there is work
        and no token in flight."""
        taken: dict[Sequence, int] = {}
        pending = [seq.num_pending_tokens for seq in self.running]
        budget = self._step_budget(pending.count(1))
        preempted: set[Sequence] = set()
        # Running before waiting: a token owed beats a token promised. A prompt in chunks takes whatever budget it
        # finds, so nobody is admitted behind it until it is done, and those who decode all stand before it.
        for seq, num_pending in zip(self.running.copy(), pending, strict=True):
            if budget == 0:
                break
            if seq in preempted:
                continue
            n = min(num_pending, budget)
            if n == 0:  # its last token is in flight
                continue
            while not self.blocks.grow(seq.block_table, seq.num_computed_tokens + n):
                victim = self.preempt_youngest()
                preempted.add(victim)
                budget += taken.pop(victim, 0)
                if victim is seq:
                    break
            else:
                taken[seq] = n
                budget -= n
        batch = Batch([], [], [], [], 0)
        for seq, n in taken.items():
            self._commit(batch, seq, n)  # only now: until here any of them could still be preempted

        num_admitted = 0
        while self.waiting and not preempted and budget and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if seq.num_tokens_in_flight:  # preempted: admitted when all its tokens are known
                break
            num_cached = self._share_prefix(seq)
            n = min(len(seq.token_ids) - num_cached, budget)
            # One spare block per running sequence, or we would preempt in the very next steps.
            if not self.blocks.grow(seq.block_table, num_cached + n, keep_free=len(self.running)):
                self.blocks.release(seq.block_table)
                break
            self.running.append(self.waiting.popleft())
            seq.slot = self._free_slots.pop()
            seq.num_computed_tokens = num_cached
            if seq.num_cached_tokens is None:
                seq.num_cached_tokens = num_cached
                self.counters.prefix_queries += seq.num_prompt_tokens
                self.counters.prefix_hits += num_cached
            self._commit(batch, seq, n)
            budget -= n
            num_admitted += 1
        return dataclasses.replace(batch, num_admitted=num_admitted)

    def preempt_youngest(self) -> Sequence:
        """Take the youngest running sequence's memory; what it has so far becomes a longer prompt."""
        seq = self.running.pop()
        self._give_back(seq)
        seq.num_computed_tokens = 0
        self.waiting.appendleft(seq)
        self.counters.preemptions += 1
        return seq

    def withdraw(self, batch: Batch) -> None:
        """Undo `schedule` for the step it chose last, which could not be launched, and choose half as many tokens from
        now on: one more with every step that succeeds."""
        size = self.blocks.block_size
        for seq, start, samples in zip(batch.sequences, batch.num_computed_tokens, batch.samples, strict=True):
            self.blocks.discard(seq.block_hashes[start // size : seq.num_known_computed_tokens // size])
            seq.num_computed_tokens = start
            seq.num_tokens_in_flight -= samples
        for _ in range(batch.num_admitted):  # they may share blocks that this step was to write
            self.preempt_youngest()
        self._budget = max(1, batch.num_tokens // 2)

    def update(self, batch: Batch, sampled: Sampled) -> dict[Sequence, FinishReason]:
        """Take in the result of a step; returns the sequences that are done, which hold no memory any more.

        Tokens of sequences that are gone are dropped; one that was preempted meanwhile gets its token.
        """
        self._budget = min(self._budget + 1, self.max_num_batched_tokens)
        finished: dict[Sequence, FinishReason] = {}
        for seq, token in zip(batch.sequences, sampled.tokens, strict=True):
            if token is None:
                continue
            seq.num_tokens_in_flight -= 1
            if token < 0:
                self.blocks.discard(seq.block_hashes)
            if seq not in self:
                continue
            reason: FinishReason | None = "error" if token < 0 else self._append(seq, token)
            if reason is not None:
                finished[seq] = reason
                del self._live[seq.sequence_id]
        if finished:
            self.running = [seq for seq in self.running if seq not in finished]
            if any(seq.slot < 0 for seq in finished):
                self.waiting = deque(seq for seq in self.waiting if seq not in finished)
            for seq in finished:
                self._give_back(seq)
        return finished

    def _step_budget(self, num_decoding: int) -> int:
        """Tokens of the next step. Whoever decodes waits for the prompts beside it, so while somebody does, these get
        3/4 of the limit, less 2 tokens for each such sequence (beside its own row it costs the reading of its context),
        and a quarter at least; of many, as many as fill the tiles of the model's products."""
        limit = self.max_num_batched_tokens
        if num_decoding:
            num_rows = num_decoding + max(1, limit // 4, 3 * limit // 4 - 2 * num_decoding)
            if num_rows >= MANY_TILES * self._row_multiple:
                num_rows = round(num_rows / self._row_multiple) * self._row_multiple
            limit = min(limit, num_rows)
        return min(limit, self._budget)

    def _append(self, seq: Sequence, token: int) -> FinishReason | None:
        num_known = seq.num_known_computed_tokens
        seq.token_ids.append(token)
        self._register(seq, num_known)
        if token in seq.params.stop_token_ids:
            return "stop"
        return "length" if seq.num_output_tokens >= seq.params.max_tokens else None

    def _give_back(self, seq: Sequence) -> None:
        """Blocks and slot."""
        self.blocks.release(seq.block_table)
        if seq.slot >= 0:
            self._free_slots.append(seq.slot)
            seq.slot = -1

    def _commit(self, batch: Batch, seq: Sequence, num_new_tokens: int) -> None:
        """Enter a sequence into the step, and let others find its blocks that are full once the step has run."""
        samples = num_new_tokens == seq.num_pending_tokens
        batch.sequences.append(seq)
        batch.num_new_tokens.append(num_new_tokens)
        batch.num_computed_tokens.append(seq.num_computed_tokens)
        batch.samples.append(samples)
        num_known = seq.num_known_computed_tokens
        seq.num_computed_tokens += num_new_tokens
        if samples:
            seq.num_tokens_in_flight += 1
        self._register(seq, num_known)

    def _share_prefix(self, seq: Sequence) -> int:
        """Give a sequence without blocks the longest prefix the cache holds; returns its length in tokens.

        At least one token is left to compute, because only computing it yields logits.
        """
        if not self.enable_prefix_caching:
            return 0
        num_usable = (len(seq.token_ids) - 1) // self.blocks.block_size
        self._hash_blocks(seq, num_usable)
        return self.blocks.share(seq.block_table, seq.block_hashes[:num_usable]) * self.blocks.block_size

    def _register(self, seq: Sequence, num_known_before: int) -> None:
        """Let others find the blocks that have become full of known tokens.

        A sequence scheduled later into the same step may already share them: in every layer the step writes all its
        K/V before attention reads any.
        """
        if not self.enable_prefix_caching:
            return
        size = self.blocks.block_size
        first, last = num_known_before // size, seq.num_known_computed_tokens // size
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
