"""A draft model: a small checkpoint beside the served one, which says how texts may go on.

It is a runner like the other, with a K/V cache of as many blocks under the same block tables. What it is asked for is a
chain of steps: one that computes what its cache lacks of each sequence, then one row of each for every further token,
launched without waiting in between, since each finds the token of the one before on the device.

It samples with the sequence's own parameters and seed. A draw is a function of seed, position and logits: with the
random numbers that the served model will use, it draws the same token wherever the two models' logits are alike, which
is much more often than the served model draws what the draft model thinks likeliest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from gptq_api.runner.loaded import LoadedRunner
from gptq_api.step import Admission, DeviceMemoryError, DraftRequest, NewBlocks, Step
from gptq_api.types import SamplingParams

_log = logging.getLogger(__name__)


class DraftRunner(LoadedRunner, Protocol):
    """A runner that lets as many steps be under way as a draft has tokens."""

    ahead: int
    """by how many places the tokens that a step computes stand behind its rows: 1 for an EAGLE-3 head"""

    def revise(self, seat: int, first: int, token_ids: list[int]) -> None:
        """The tokens of a sequence from place `first` on are these and not what steps have sampled."""


@dataclass(slots=True)
class _Seated:
    """What the runner knows of one sequence."""

    seat: int
    num_known: int
    """tokens that are told; what follows them there are guesses"""
    num_blocks: int
    """of its block table"""


class ModelDrafter:
    """A `step.Drafter`. Not thread-safe, and nothing of the served model is under way while it is asked."""

    def __init__(
        self, runner: DraftRunner, *, max_seqs: int, max_rows: int, step_cost: float, row_cost: float, call_cost: float
    ) -> None:
        self._runner = runner
        self.vocab_size, self.max_model_len, self.ahead = runner.vocab_size, runner.max_model_len, runner.ahead
        self.max_seqs, self.max_rows = max_seqs, max_rows
        self.step_cost, self.row_cost, self.call_cost = step_cost, row_cost, call_cost
        self._max_blocks = -(-runner.max_model_len // runner.block_size)
        self._seated: dict[int, _Seated] = {}  # by key, who was asked for longest ago first

    def draft(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """For each request what may follow; fewer tokens than asked for where there is no memory, or logits are not
        finite. DeviceMemoryError where not even their tokens could be computed."""
        if self.ahead and (lone := [i for i, request in enumerate(requests) if self._last_row(request) < 1]):
            # No row sees a first token alone.
            found = iter(self.draft(others) if (others := [r for i, r in enumerate(requests) if i not in lone]) else [])
            return [[] if i in lone else next(found) for i in range(len(requests))]
        step = Step([], [], [], [], [], [])
        keys = {request.key for request in requests}
        for request in requests:
            first = max(0, request.num_computed - self.ahead)
            step.seats.append(self._take_in(request, step, keys))
            step.num_computed.append(first)
            step.num_new.append(self._last_row(request) - first)
            step.num_sampled.append(min(1, request.num_drafts))
        launched = [([i for i, num in enumerate(step.num_sampled) if num], self._launch_first(step, requests))]
        for depth in range(1, max(request.num_drafts for request in requests)):
            entries = [i for i, request in enumerate(requests) if request.num_drafts > depth]
            try:
                launched.append((entries, self._runner.launch(self._behind(step, requests, entries, depth))))
            except DeviceMemoryError:
                break
        drafts: list[list[int]] = [[] for _ in requests]
        sick = set[int]()
        for entries, one in launched:
            for i, token in zip(entries, self._runner.collect(one).tokens, strict=True):
                if token < 0:
                    sick.add(i)
                if i not in sick:
                    drafts[i].append(token)
        return drafts

    def _last_row(self, request: DraftRequest) -> int:
        """Behind which its tokens are all computed."""
        return request.num_computed + request.num_new - self.ahead

    def _behind(self, first: Step, requests: Sequence[DraftRequest], entries: list[int], depth: int) -> Step:
        """One row more of these requests, behind their `depth`-th guessed token."""
        ones, last = [1] * len(entries), depth - 1 - self.ahead
        computed = [len(requests[i].token_ids) + last for i in entries]
        return Step([first.seats[i] for i in entries], computed, ones, ones, [], [])

    def _launch_first(self, step: Step, requests: Sequence[DraftRequest]) -> Any:
        try:
            return self._runner.launch(step)
        except DeviceMemoryError as error:
            _log.warning("no memory on the device for %d tokens of the draft model: %s", step.num_tokens, error)
            for request in requests:  # who was admitted may not be known there
                self._seated.pop(request.key, None)
            raise

    def _take_in(self, request: DraftRequest, step: Step, keys: set[int]) -> int:
        """Its seat, and what has to be told of it."""
        tokens, table = request.token_ids, request.block_table[: self._max_blocks]
        seated = self._seated.pop(request.key, None)
        if seated is None:
            seated = _Seated(self._free_seat(keys), len(tokens), 0)
            params = _params(request.params, self.vocab_size)
            step.admitted.append(Admission(seated.seat, list(tokens), request.num_prompt_tokens, params))
        elif seated.num_known < len(tokens):
            self._runner.revise(seated.seat, seated.num_known, tokens[seated.num_known :])
            seated.num_known = len(tokens)
        if seated.num_blocks < len(table):
            step.new_blocks.append(NewBlocks(seated.seat, seated.num_blocks, table[seated.num_blocks :]))
            seated.num_blocks = len(table)
        self._seated[request.key] = seated
        return seated.seat

    def _free_seat(self, keys: set[int]) -> int:
        """Of nobody, or of the one that was asked for longest ago and is not now."""
        if len(self._seated) < self.max_seqs:
            return min(set(range(self.max_seqs)) - {seated.seat for seated in self._seated.values()})
        return self._seated.pop(next(key for key in self._seated if key not in keys)).seat


def _params(params: SamplingParams, vocab_size: int) -> SamplingParams:
    """Of a draft: nobody reads logprobs of it, and a smaller vocabulary has no row for some ids."""
    return msgspec.structs.replace(
        params,
        top_logprobs=None,
        prompt_logprobs=None,
        logit_bias={token: bias for token, bias in params.logit_bias.items() if token < vocab_size},
        stop_token_ids=tuple(token for token in params.stop_token_ids if token < vocab_size),
    )
