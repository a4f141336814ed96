"""A runner that is no model: the next token is a hash of the tokens before it, read where a device would read them.

It has a device's memory and nothing else: by seat the tokens of an admission and what was sampled since, and for every
KV slot the tokens it was written for. A step's work is done when its result is asked for, in the order of launching.
Stale blocks, positions or seats are assertion errors.

Of a sequence's drafted tokens it takes those that it would have sampled anyway, or fewer, as it likes; the rows of the
others leave in the cache what they were computed from.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec

from gptq_api.step import Admission, DeviceMemoryError, Masks, PromptCosts, Sampled, Step
from gptq_api.types import PromptLogprobs, SamplingParams

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


def score(prefix: list[int]) -> float:
    """How likely the last of these tokens is."""
    return -int.from_bytes(blake2b(bytes(prefix), digest_size=2).digest(), "little") / 2**12


def expected(prompt: list[int], params: SamplingParams) -> tuple[list[int], str]:
    """(the tokens a sequence gets, its finish reason)."""
    ids = list(prompt)
    if not params.max_tokens:
        return [], "error" if next_token(ids, len(prompt), params) < 0 else "length"
    while len(ids) < len(prompt) + params.max_tokens:
        token = next_token(ids, len(prompt), params)
        if token < 0:
            return ids[len(prompt) :], "error"
        ids.append(token)
        if token in params.stop_token_ids:
            return ids[len(prompt) :], "stop"
    return ids[len(prompt) :], "length"


@dataclass
class Seat:
    """What the device knows of one sequence."""

    admission: Admission
    history: list[int] = field(init=False)
    block_table: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.history = list(self.admission.token_ids)


@dataclass
class Launched:
    step: Step
    result: Sampled | None = None


class ToyRunner:
    """`out_of_memory`: the share of launches of more than one token that fail; `max_tokens`: more always fail;
    `confirms`: how likely a draft that is right is taken; `prompts_apart`: steps are of prompts or of answers, and a
    token in the cache is not the same when it was computed as the other."""

    vocab_size = NUM_TOKENS
    num_graphs = 0
    prompt_costs: PromptCosts | None = None
    row_cost, context_cost = 0.02, 0.0

    def __init__(
        self,
        lookahead: int,
        max_num_seqs: int,
        block_size: int,
        out_of_memory: float = 0.0,
        max_tokens: int = 10**9,
        max_draft_rows: int = 0,
        confirms: float = 1.0,
        prompts_apart: bool = False,
    ) -> None:
        self.lookahead, self.max_num_seqs, self.block_size = lookahead, max_num_seqs, block_size
        self.out_of_memory, self.max_tokens = out_of_memory, max_tokens
        self.max_draft_rows, self.confirms = max_draft_rows, confirms
        self.wait_cost, self.prompts_apart = 0.1 * lookahead, prompts_apart
        self.num_rows = 0
        self.num_confirmed = 0
        """drafted tokens that counted"""
        self.num_launches = self.num_late = 0
        """of these, launches that found the device idle"""
        self.most_in_flight = 0
        self._rng = random.Random(5)
        self._seats: dict[int, Seat] = {}
        self._kv: dict[int, list[int]] = {}
        self._answered: set[int] = set()
        """slots written by answers"""
        self._queue: deque[Launched] = deque()

    def launch(self, step: Step) -> Launched:
        assert len(set(step.seats)) == len(step.seats) and all(0 <= seat < self.max_num_seqs for seat in step.seats)
        assert {new.seat for new in step.admitted} | {new.seat for new in step.new_blocks} <= set(step.seats)
        if step.num_tokens > self.max_tokens or (step.num_tokens > 1 and self._rng.random() < self.out_of_memory):
            raise DeviceMemoryError(f"{step.num_tokens} tokens")
        if step.drafts:
            assert not step.admitted and sum(step.num_new) <= self.max_draft_rows
            assert all(drafts for drafts in step.drafts.values()) and max(step.drafts) < len(step.seats)
            assert not self._queue, "drafted behind tokens that nobody knows"
        for entry, num in enumerate(step.num_sampled):
            wanted = 1 + len(step.drafts[entry]) if entry in step.drafts else min(num, 1)
            assert num == wanted and (entry not in step.drafts or step.num_new[entry] == wanted)
        self.num_rows += step.num_tokens
        self.num_launches, self.num_late = self.num_launches + 1, self.num_late + (not self._queue)
        # A value: what is done with it later must not depend on what happens meanwhile.
        launched = Launched(msgspec.json.decode(msgspec.json.encode(step), type=Step))
        self._queue.append(launched)
        self.most_in_flight = max(self.most_in_flight, len(self._queue))
        assert len(self._queue) <= self.lookahead + 1
        return launched

    def draw(self, launched: Launched, masks: Masks) -> None:
        raise AssertionError("nobody asked for a grammar")

    def collect(self, launched: Launched) -> Sampled:
        assert self._queue.popleft() is launched, "collected out of order"
        return self._execute(launched.step)

    def _execute(self, step: Step) -> Sampled:
        for new in step.admitted:
            self._seats[new.seat] = Seat(new)
        for blocks in step.new_blocks:
            self._seats[blocks.seat].block_table[blocks.first :] = blocks.block_ids
        seats = [self._seats[seat] for seat in step.seats]
        drafts = [step.drafts.get(entry, []) for entry in range(len(seats))]
        work = list(zip(seats, step.num_computed, step.num_new, step.num_sampled, drafts, strict=True))
        if self.prompts_apart:
            self._take_apart(work)
        for seat, start, num_new, num_sampled, drafted in work:
            end = start + num_new - len(drafted)
            assert num_new >= 1 and end <= len(seat.history), "a token nobody has sampled"
            assert (num_sampled > 0) == (end == len(seat.history))
            for position in range(start, end):
                self._kv[self._kv_slot(seat, position)] = seat.history[: position + 1]
            for i in range(1, 1 + len(drafted)):
                self._kv[self._kv_slot(seat, end + i - 1)] = seat.history + drafted[:i]
        counts: list[int] = []
        tokens: list[int] = []
        for seat, start, num_new, num_sampled, drafted in work:  # after all writes: as a layer does
            text = seat.history + drafted
            for position in range(start + num_new):
                assert self._kv.get(self._kv_slot(seat, position)) == text[: position + 1], "stale K/V"
            sampled = self._sample(seat, drafted) if num_sampled else []
            counts.append(len(sampled))
            tokens += sampled
        scores = dict[int, PromptLogprobs]()
        for entry, rows in step.prompt_rows.items():
            seat, start, num_new, _, _ = work[entry]
            assert rows.num and start <= rows.first and rows.first + rows.num <= start + num_new
            assert rows.first + rows.num < seat.admission.num_prompt_tokens
            assert rows.num_top == seat.admission.params.prompt_logprobs
            told = range(rows.first, rows.first + rows.num)
            logprobs = array("f", [score(seat.history[: row + 2]) for row in told])
            scores[entry] = PromptLogprobs(rows.first + 1, logprobs.tobytes(), b"", b"", b"")
        return Sampled(counts, tokens, {}, scores)

    def _take_apart(self, work: list[tuple[Seat, int, int, int, list[int]]]) -> None:
        (prompts,) = {start < seat.admission.num_prompt_tokens for seat, start, *_ in work}
        for seat, start, num_new, *_ in work:
            assert not prompts or start + num_new <= seat.admission.num_prompt_tokens, "a prompt and its answer"
            slots = {self._kv_slot(seat, position) for position in range(start, start + num_new)}
            self._answered = self._answered - slots if prompts else self._answered | slots
        for seat, start, *_ in work:
            slots = {self._kv_slot(seat, position) for position in range(start)}
            answers = {self._kv_slot(seat, position) for position in range(seat.admission.num_prompt_tokens, start)}
            assert slots & self._answered == answers, "computed as the other"

    def _sample(self, seat: Seat, drafted: list[int]) -> list[int]:
        params, sampled = seat.admission.params, list[int]()
        num_prompt = seat.admission.num_prompt_tokens
        while not sampled or (
            sampled == drafted[: len(sampled)]
            and len(sampled) <= len(drafted)
            and (self.confirms == 1 or self._rng.random() < self.confirms)
        ):
            # Behind a token that could not be sampled all is noise, and nobody may look at it.
            sick = -1 in seat.history
            token = -1 if sick else next_token(seat.history, num_prompt, params)
            assert sick or len(seat.history) - num_prompt < max(1, params.max_tokens), "a surplus token"
            seat.history.append(token)
            sampled.append(token)
        self.num_confirmed += max(0, len(sampled) - 1)
        return sampled

    def _kv_slot(self, seat: Seat, position: int) -> int:
        return seat.block_table[position // self.block_size] * self.block_size + position % self.block_size
