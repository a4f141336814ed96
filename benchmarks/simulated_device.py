"""A device that exists only as the time its steps take: a runner for the real engine that computes nothing.

Steps take as long as those of LLaMA-13B, group 128, took on an H200 at commit e6c8813 (benchmarks/results/
decode-nvidia-h200.json, fitted within 5 %): the Linears by rows, attention by the tokens that decoding sequences
read, sampling by sequence. Launching returns at once and collecting sleeps until the step would have ended, so what a
process with this runner burns is what the host costs.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from gptq_api.step import Masks, PromptCosts, Sampled, Step

_ROWS_MS = ((1, 3.2), (8, 3.2), (32, 4.4), (64, 5.7), (128, 7.6), (256, 12.6), (512, 20.9), (2048, 77.5), (8192, 310.0))
"""rows of a step -> what its Linears take"""
_CONTEXT_MS = 0.2e-3
"""per token of a decoding sequence: 819 KB of K and V at 4 TB/s"""
_PROMPT_CONTEXT_MS = 1.9e-6
"""per row of a prompt and token before it: 0.82 MFLOP at 430 TFLOP/s"""
_SAMPLE_MS = 0.0125
"""per sampled token"""
FIRST_TOKEN = 16_000
"""from here to VOCAB_SIZE the ids of bench/synthetic.py's tokenizer are words that begin with a tilde"""
VOCAB_SIZE = 32_000


def step_ms(rows: int, context: int, sampled: int, prompt_context: float = 0) -> float:
    """Milliseconds of a step; `context`: tokens that its decoding sequences see, together; `prompt_context`: those that
    the rows of prompts see."""
    i = min(max(bisect_right(_ROWS_MS, (rows, 0.0)), 1), len(_ROWS_MS) - 1)
    (low, low_ms), (high, high_ms) = _ROWS_MS[i - 1], _ROWS_MS[i]
    linears = low_ms + (max(rows, 1) - low) * (high_ms - low_ms) / (high - low)
    return linears + context * _CONTEXT_MS + sampled * _SAMPLE_MS + prompt_context * _PROMPT_CONTEXT_MS


@dataclass(slots=True)
class _Launched:
    ends: float
    step: Step
    sampled: Sampled


class SimulatedRunner:
    """One step ahead, as the CUDA runner is. Tokens are a hash of seat and position."""

    lookahead = 1
    num_graphs = 0
    row_multiple = 192
    shared_rows = None
    prompts_apart = False
    drafter = None
    max_draft_rows, row_cost, wait_cost, context_cost = 0, 0.02, 0.1, 0.0
    prompt_costs: PromptCosts | None = PromptCosts(decode_ms=3.2, row_ms=0.037, context_ms=1.9e-6)
    num_blocks, block_size = 9594, 16
    max_model_len = 4096
    vocab_size = VOCAB_SIZE
    device, dtype = "cuda", "float16"
    eos_token_ids = (1,)
    facts = None
    description = "a simulated device: nothing is computed"

    def __init__(self, now: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        self._now, self._sleep = now, sleep
        self._busy_until = 0.0

    def launch(self, step: Step) -> _Launched:
        columns = list(zip(step.num_computed, step.num_new, strict=True))
        context = sum(start for start, n in columns if n == 1)
        prompts = sum(n * (start + n / 2) for start, n in columns if n > 1)
        seconds = step_ms(step.num_tokens, context, sum(step.num_sampled), prompts) / 1e3
        self._busy_until = max(self._now(), self._busy_until) + seconds
        tokens = [
            FIRST_TOKEN + (seat * 7919 + start * 104729) % (VOCAB_SIZE - FIRST_TOKEN)
            for seat, start, num in zip(step.seats, step.num_computed, step.num_sampled, strict=True)
            if num
        ]
        return _Launched(self._busy_until, step, Sampled(step.num_sampled, tokens))

    def draw(self, launched: _Launched, masks: Masks) -> None:
        """The hash chooses among what is allowed. Masks that come after the logits make the device wait."""
        self._busy_until = max(self._now(), self._busy_until)
        launched.ends = self._busy_until
        place_of = dict[int, int]()
        for entry, num in enumerate(launched.step.num_sampled):
            if num:
                place_of[entry] = len(place_of)
        tokens = list(launched.sampled.tokens)
        for entry, words in zip(masks.entries, masks.words, strict=True):
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), count=VOCAB_SIZE, bitorder="little"))
            tokens[place_of[entry]] = int(allowed[tokens[place_of[entry]] % len(allowed)])
        launched.sampled = msgspec.structs.replace(launched.sampled, tokens=tokens)

    def collect(self, launched: _Launched) -> Sampled:
        self._sleep(max(0.0, launched.ends - self._now()))
        return launched.sampled
