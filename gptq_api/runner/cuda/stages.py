"""The memory through which a step on CUDA goes to the device and comes back, and what is known of it meanwhile.

A view of a tensor takes the host a microsecond, and the device waits for those of a step with drafts: what steps of one
shape use is made once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from gptq_api.kernels.sampling import MAX_TOP_LOGPROBS, SamplingInputs, StepNeeds
from gptq_api.runner.cuda.prompt_logprobs import PromptScores
from gptq_api.runner.inputs import Ints, StepInputs, StepShape, num_words
from gptq_api.step import Step


@dataclass(slots=True, frozen=True)
class Staged:
    """A stage's memory, as steps of one shape use it."""

    inputs: StepInputs[Ints]
    words: Tensor
    """the same, all that is copied"""
    tokens: Tensor
    """int32 [S]"""


class Stage:
    """Pinned memory of one step: what the device reads, and what it answers."""

    def __init__(self, num_words: int, max_num_seqs: int) -> None:
        def pinned(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, pin_memory=True)

        self._inputs, self._tokens = pinned(num_words), pinned(max_num_seqs)
        self.logprobs = pinned(max_num_seqs, 2, 1 + MAX_TOP_LOGPROBS)
        self.drawn: Ints = self._tokens.numpy()
        """the token of each row, once `done`"""
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._views: dict[StepShape, Staged] = {}

    def views(self, shape: StepShape, keep: bool) -> Staged:
        """`keep`: the shape will come again."""
        found = self._views.get(shape)
        if found is None:
            words, tokens = self._inputs[: num_words(shape)], self._tokens[: shape.num_sequences]
            found = Staged(StepInputs.over(words.numpy(), shape), words, tokens)
            if keep:
                self._views[shape] = found
        return found


@dataclass(slots=True, frozen=True)
class OnDevice:
    """The device's memory, as steps of one shape use it."""

    inputs: StepInputs[Tensor]
    words: Tensor
    tokens: Tensor
    how: SamplingInputs
    """a part of the inputs"""


@dataclass(slots=True)
class Launched:
    """A step under way. With drafts each of its rows counts as a sequence."""

    step: Step
    stage: Stage
    staged: Staged
    there: OnDevice
    logits: Tensor
    """[S, V], until the next step"""
    seats: list[int]
    """[S], -1: not sampled from, or padding"""
    lengths: list[int]
    """[S], tokens in the cache after it"""
    num_rows: int
    """of the S, without padding"""
    needs: StepNeeds
    num_top: list[int] | None
    """top_logprobs of each sequence, -1: none; None: none of any"""
    scores: PromptScores | None
    """logprobs of the prompts, where they were asked for"""
    waits: bool
    """for masks, before it samples"""

    def rows_of(self, entries: list[int]) -> list[int]:
        """The only rows of these entries of the step: one with a grammar has no drafts."""
        if not self.step.drafts:
            return entries
        first_rows = [0, *accumulate(self.step.num_new)]
        return [first_rows[entry] for entry in entries]
