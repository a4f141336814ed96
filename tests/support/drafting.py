"""Sequences that get several tokens a step, without a scheduler: their owner drafts."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from gptq_api.runner.cuda.runner import CudaRunner
from gptq_api.runner.solo import Solo, step_of
from gptq_api.step import Masks, Step
from gptq_api.types import SamplingParams, TokenLogprobs

NUM_TOKENS = 40
BLOCKS_EACH = 16
Drafts = Callable[[int, list[int]], list[int]]
"""(sequence, its output so far) -> what may come next"""


def nothing(sequence: int, output: list[int]) -> list[int]:
    return []


class Text:
    """A sequence, and what it got."""

    def __init__(self, prompt: list[int], params: SamplingParams, seat: int) -> None:
        first = 1 + seat * BLOCKS_EACH
        self.solo = Solo(list(prompt), params, list(range(first, first + BLOCKS_EACH)), seat)
        self.logprobs: list[TokenLogprobs] = []

    @property
    def output(self) -> list[int]:
        return self.solo.token_ids[self.solo.num_prompt_tokens :]


def with_drafts(step: Step, drafts: dict[int, list[int]]) -> Step:
    rows = [1 + len(drafts.get(entry, ())) for entry in range(len(step.seats))]
    return msgspec.structs.replace(step, num_new=rows, num_sampled=rows, drafts=drafts)


def generate(runner: CudaRunner, prompts: list[list[int]], params: list[SamplingParams], drafts: Drafts) -> list[Text]:
    """All of them at once; each step has as many drafts as `drafts` gives and rows are left."""
    texts = [Text(prompt, one, seat) for seat, (prompt, one) in enumerate(zip(prompts, params, strict=True))]
    masks = np.full((1, -(-runner.vocab_size // 32)), -1, np.int32)
    while left := [text for text in texts if len(text.output) < NUM_TOKENS]:
        solos = [text.solo for text in left]
        step = step_of(solos, [solo.num_pending_tokens for solo in solos])
        found: dict[int, list[int]] = {}
        if not step.admitted:
            spare = runner.max_draft_rows - len(solos)
            for entry, text in enumerate(left):
                if not text.solo.params.grammar:
                    guess = drafts(text.solo.seat, text.output)[: min(spare, NUM_TOKENS - len(text.output) - 1)]
                    spare -= len(guess)
                    found |= {entry: guess} if guess else {}
        if found:
            step = with_drafts(step, found)
        launched = runner.launch(step)
        grammars = [entry for entry, solo in enumerate(solos) if solo.params.grammar]
        if grammars:
            runner.draw(launched, Masks(grammars, masks.repeat(len(grammars), 0)))
        sampled, place = runner.collect(launched), 0
        for text, num in zip(left, sampled.num_tokens, strict=True):
            assert num >= 1
            text.solo.token_ids += sampled.tokens[place : place + num]
            text.solo.num_computed_tokens = len(text.solo.token_ids) - 1
            text.logprobs += [sampled.logprobs[i] for i in range(place, place + num) if i in sampled.logprobs]
            place += num
    return texts
