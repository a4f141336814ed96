"""Steps to run again and again: whoever computes them gets the same bits every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gptq_api.step import Admission, NewBlocks, Step
from gptq_api.types import SamplingParams

NUM_SEQS, PROMPT = 8, 20
_DECODING = (8, 1, 2, 8, 5, 4, 8, 3)


def cycle(num_steps: int, vocab_size: int, block_size: int) -> list[Step]:
    """The prompts of eight sequences, greedy and sampled, in one step; then steps in which one to eight of them decode.
    The first step makes each forget what it had. Their blocks are the first `num_blocks`."""
    size = _blocks_each(num_steps, block_size)
    seats, lengths = list(range(NUM_SEQS)), [PROMPT] * NUM_SEQS
    texts = [[3 + (7 * i + 31 * seat) % (vocab_size - 3) for i in range(PROMPT)] for seat in seats]
    params = [SamplingParams(max_tokens=num_steps, temperature=0.9 * (seat % 2), seed=seat) for seat in seats]
    admitted = [Admission(seat, texts[seat], PROMPT, params[seat]) for seat in seats]
    blocks = [NewBlocks(seat, 0, list(range(seat * size, (seat + 1) * size))) for seat in seats]
    steps = [Step(seats, [0] * NUM_SEQS, list(lengths), [1] * NUM_SEQS, blocks, admitted)]
    for i in range(num_steps - 1):
        decoding = sorted((i + k) % NUM_SEQS for k in range(_DECODING[i % len(_DECODING)]))
        ones = [1] * len(decoding)
        steps.append(Step(decoding, [lengths[seat] for seat in decoding], ones, ones, [], []))
        for seat in decoding:
            lengths[seat] += 1
    return steps


def num_blocks(num_steps: int, block_size: int) -> int:
    return NUM_SEQS * _blocks_each(num_steps, block_size)


def _blocks_each(num_steps: int, block_size: int) -> int:
    return -(-(PROMPT + num_steps) // block_size)


def repeated(runner: Any, steps: list[Step], num_steps: int, before: Callable[[int], None]) -> tuple[int, int]:
    """Runs a cycle again and again on ranks that are CudaRunners, a step ahead: (how many steps, in how many logits and
    tokens, of any rank, they were not those of the first time on rank 0). `before`: called for a rank, on its stream,
    before each step."""
    ranks, bits, tokens = runner.ranks, list[list[torch.Tensor]](), list[list[int]]()
    wrong = [torch.zeros(1, dtype=torch.int64, device=rank.device) for rank in ranks]
    waiting, done, differing = list[tuple[int, Any]](), 0, 0

    def collect() -> int:
        i, launched = waiting.pop(0)
        found = runner.collect(launched).tokens
        if len(tokens) == i:
            tokens.append(found)
        return sum(a != b for a, b in zip(found, tokens[i], strict=True))

    while done < num_steps:
        for i, step in enumerate(steps):
            for number, rank in enumerate(ranks):
                with torch.cuda.stream(rank.stream):
                    before(number)
            launched = runner.launch(step)
            found = []
            for rank, its in zip(ranks, launched, strict=True):
                with torch.cuda.stream(rank.stream):
                    found.append(its.logits[: its.num_rows].view(torch.int32).clone())
            if len(bits) == i:
                first = found[0].cpu()
                bits.append([first.to(rank.device) for rank in ranks])
            for rank, count, own, expected in zip(ranks, wrong, found, bits[i], strict=True):
                with torch.cuda.stream(rank.stream):
                    count += (own != expected).sum()
            waiting.append((i, launched))
            if len(waiting) > 1:
                differing += collect()
        done += len(steps)
    while waiting:
        differing += collect()
    for rank in ranks:
        rank.stream.synchronize()
    return done, differing + sum(int(count) for count in wrong)
