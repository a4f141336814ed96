"""What steps with drafts cost, measured at start as they will be: launched, collected, and only then the next one."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

from gptq_api.step import Admission, NewBlocks, Step
from gptq_api.types import SamplingParams

if TYPE_CHECKING:
    from gptq_api.runner.cuda.runner import CudaRunner

_CONTEXT = 128
"""tokens before the rows that are measured; what more of them costs is the runner's context_cost"""
_NUM_STEPS = 12


def draft_costs(runner: CudaRunner) -> tuple[float, float]:
    """(row_cost, wait_cost). To be called before any sequence is there: seat 0 and the first blocks are used."""
    many = runner.max_draft_rows
    at = min(_CONTEXT, runner.max_model_len - 1 - many, runner.num_blocks * runner.block_size - many)
    if at < 1 or many < 3:
        return runner.row_cost, runner.wait_cost
    blocks = list(range(-(-(at + many) // runner.block_size)))
    admission = Admission(0, [0], 1, SamplingParams(max_tokens=1, temperature=0))
    runner.collect(runner.launch(Step([0], [0], [1], [1], [NewBlocks(0, 0, blocks)], [admission])))
    plain_ms = _ahead_ms(runner, _rows(at, 1))
    few_ms, launch_ms = _waiting_ms(runner, _rows(at, 2))
    many_ms, _ = _waiting_ms(runner, _rows(at, many))
    row_ms = max(0.0, many_ms - few_ms) / (many - 2)
    # To digest the tokens and to choose the next step takes the scheduler as long as launching takes here.
    wait_ms = max(0.0, few_ms - row_ms - plain_ms) + launch_ms
    return max(0.0, row_ms / plain_ms - runner.context_cost * at), wait_ms / plain_ms


def _rows(at: int, num: int) -> Step:
    """Of one sequence."""
    return Step([0], [at], [num], [num], [], [], drafts={0: [0] * (num - 1)} if num > 1 else {})


def _ahead_ms(runner: CudaRunner, step: Step) -> float:
    """Of a step that is launched while the one before it runs."""
    runner.collect(runner.launch(step))
    before, launched = runner.launch(step), runner.launch(step)
    runner.collect(before)
    began = time.perf_counter()
    for _ in range(_NUM_STEPS):
        before, launched = launched, runner.launch(step)
        runner.collect(before)
    ended = time.perf_counter()
    runner.collect(launched)
    return (ended - began) * 1e3 / _NUM_STEPS


def _waiting_ms(runner: CudaRunner, step: Step) -> tuple[float, float]:
    """(of a step that is launched and waited for, its launch alone)."""
    runner.collect(runner.launch(step))
    wholes, launches = list[float](), list[float]()
    for _ in range(_NUM_STEPS):
        began = time.perf_counter()
        launched = runner.launch(step)
        ended = time.perf_counter()
        runner.collect(launched)
        wholes.append((time.perf_counter() - began) * 1e3)
        launches.append((ended - began) * 1e3)
    return statistics.median(wholes), statistics.median(launches)
