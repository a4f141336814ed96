"""A runner that is no model: the next token is a hash of the tokens before it, read where a device would read them.

It has a device's memory and nothing else: `history` by slot, filled at admission and extended by what is sampled, and
for every KV slot the tokens it was written for. What it is launched with is read at once; the work itself is done when
its result is asked for, in the order of launching. Stale blocks, positions or slots are assertion errors.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from hashlib import blake2b

from gptq_api.sequence import Batch, DeviceMemoryError, Sampled, Sequence
from gptq_api.types import SamplingParams

STOP = 0
NUM_TOKENS = 8
"""vocabulary"""


def next_token(prefix: list[int], num_prompt_tokens: int, params: SamplingParams) -> int:
    """-1 now and then, where the parameters ask for it with a logit_bias of token 1."""
    digest = blake2b(bytes(prefix), digest_size=4, key=params.seed.to_bytes(8, "little")).digest()
    number = int.from_bytes(digest, "little")
    if params.logit_bias.get(1) and number % 23 == 0:
        return -1
    token = number // 23 % NUM_TOKENS
    stops = token in params.stop_token_ids
    return NUM_TOKENS - 1 if stops and len(prefix) - num_prompt_tokens < params.min_tokens else token


def expected(prompt: list[int], params: SamplingParams) -> tuple[list[int], str]:
    """(the tokens a sequence gets, its finish reason)."""
    ids = list(prompt)
    while len(ids) < len(prompt) + params.max_tokens:
        token = next_token(ids, len(prompt), params)
        if token < 0:
            return ids[len(prompt) :], "error"
        ids.append(token)
        if token in params.stop_token_ids:
            return ids[len(prompt) :], "stop"
    return ids[len(prompt) :], "length"


@dataclass
class Work:
    """One sequence's share of a step, as copied to the device."""

    slot: int
    start: int
    num_new: int
    samples: bool
    upload: list[int] | None
    block_table: list[int]
    num_prompt_tokens: int
    params: SamplingParams


@dataclass
class Step:
    work: list[Work]
    result: Sampled | None = None


class ToyRunner:
    """`out_of_memory`: the share of launches of more than one token that fail; `max_tokens`: more always fail."""

    def __init__(
        self, lookahead: int, max_num_seqs: int, block_size: int, out_of_memory: float = 0.0, max_tokens: int = 10**9
    ) -> None:
        self.lookahead, self.max_num_seqs, self.block_size = lookahead, max_num_seqs, block_size
        self.out_of_memory, self.max_tokens = out_of_memory, max_tokens
        self.num_rows = 0
        self.most_in_flight = 0
        self._rng = random.Random(5)
        self._history: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self._kv: dict[int, list[int]] = {}
        self._queue: deque[Step] = deque()

    def launch(self, batch: Batch) -> Step:
        num_running = len(batch.sequences) - batch.num_admitted
        admitted = [i >= num_running for i in range(len(batch.sequences))]
        step = Step([self._copy(batch, i, is_new) for i, is_new in enumerate(admitted)])
        slots = [work.slot for work in step.work]
        assert len(set(slots)) == len(slots) and all(0 <= slot < self.max_num_seqs for slot in slots)
        if batch.num_tokens > self.max_tokens or (batch.num_tokens > 1 and self._rng.random() < self.out_of_memory):
            raise DeviceMemoryError(f"{batch.num_tokens} tokens")
        self.num_rows += batch.num_tokens
        self._queue.append(step)
        self.most_in_flight = max(self.most_in_flight, len(self._queue))
        assert len(self._queue) <= self.lookahead + 1
        return step

    def collect(self, launched: Step) -> Sampled:
        step = self._queue.popleft()
        assert step is launched, "collected out of order"
        return self._execute(step)

    def _copy(self, batch: Batch, i: int, admitted: bool) -> Work:
        seq: Sequence = batch.sequences[i]
        return Work(
            seq.slot,
            batch.num_computed_tokens[i],
            batch.num_new_tokens[i],
            batch.samples[i],
            list(seq.token_ids) if admitted else None,
            list(seq.block_table),
            seq.num_prompt_tokens,
            seq.params,
        )

    def _execute(self, step: Step) -> Sampled:
        for work in step.work:
            if work.upload is not None:
                self._history[work.slot] = work.upload
        for work in step.work:
            history = self._history[work.slot]
            assert work.num_new >= 1 and work.start + work.num_new <= len(history), "a token nobody has sampled"
            assert work.samples == (work.start + work.num_new == len(history))
            for position in range(work.start, work.start + work.num_new):
                self._kv[self._kv_slot(work, position)] = history[: position + 1]
        tokens: list[int | None] = []
        for work in step.work:  # after all writes: as a layer does
            history = self._history[work.slot]
            for position in range(work.start + work.num_new):
                assert self._kv.get(self._kv_slot(work, position)) == history[: position + 1], "stale K/V"
            if not work.samples:
                tokens.append(None)
                continue
            # Behind a token that could not be sampled all is noise, and nobody may look at it.
            sick = -1 in history
            token = -1 if sick else next_token(history, work.num_prompt_tokens, work.params)
            assert sick or len(history) - work.num_prompt_tokens < work.params.max_tokens, "a surplus token"
            history.append(token)
            tokens.append(token)
        return Sampled(tokens, [None] * len(tokens))

    def _kv_slot(self, work: Work, position: int) -> int:
        return work.block_table[position // self.block_size] * self.block_size + position % self.block_size
