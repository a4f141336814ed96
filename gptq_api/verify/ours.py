"""What this machine makes of a checkpoint: logits by the kernels of prompts, greedy tokens by those of decoding."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.solo import Solo, step_of
from gptq_api.types import SamplingParams

BLOCK_SIZE = 16
_CHUNK = 256
_GREEDY = SamplingParams(max_tokens=1, temperature=0)


@dataclass(frozen=True)
class Answered:
    """A prompt, and what followed it."""

    token_ids: list[int]
    num_prompt_tokens: int
    logits: Tensor
    """float32 [T, V] on the CPU, one row after each of `token_ids`"""


def answer(runner: LoadedRunner, prompt: list[int], num_tokens: int) -> Answered:
    """`num_tokens` greedy tokens, fewer where the model ends or its logits are not finite; then the logits of prompt
    and answer, computed at once as a prompt's are."""
    token_ids = list(prompt)
    for token in _greedy(runner, prompt, num_tokens):
        token_ids.append(token)
        if token in runner.eos_token_ids:
            break
    return Answered(token_ids, len(prompt), _logits(runner, token_ids))


def _solo(token_ids: list[int], num_tokens: int) -> Solo:
    return Solo(list(token_ids), _GREEDY, block_table=list(range(-(-num_tokens // BLOCK_SIZE))))


def _greedy(runner: LoadedRunner, prompt: list[int], num_tokens: int) -> list[int]:
    solo = _solo(prompt, len(prompt) + num_tokens)  # the last token is computed where a step is launched ahead
    tokens: list[int] = []
    while solo.num_pending_tokens:
        tokens = runner.collect(runner.launch(step_of([solo], [min(_CHUNK, solo.num_pending_tokens)]))).tokens
    found = [tokens[0]]
    launched: deque[Any] = deque()
    while len(found) < num_tokens and found[-1] >= 0:
        if not launched:
            solo.token_ids.append(found[-1])
        launched.append(runner.launch(step_of([solo], [1])))
        if len(launched) > runner.lookahead:
            found.append(runner.collect(launched.popleft()).tokens[0])
            if runner.lookahead:
                solo.token_ids.append(found[-1])
    while launched:
        runner.collect(launched.popleft())
    return [token for token in found if token >= 0]


def _logits(runner: LoadedRunner, token_ids: list[int]) -> Tensor:
    solo, rows = _solo(token_ids, len(token_ids)), []
    while solo.num_pending_tokens:
        step = step_of([solo], [min(_CHUNK, solo.num_pending_tokens)])
        rows.append(runner.logits(step, every_row=True)[0].float().cpu())
    return torch.cat(rows)
