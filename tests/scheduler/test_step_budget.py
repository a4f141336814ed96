"""How many tokens a step computes beside sequences that decode."""

from __future__ import annotations

import pytest

from gptq_api.scheduler.step_budget import QUEUE, StepBudget
from gptq_api.step import PromptCosts

COSTS = PromptCosts(decode_ms=2.0, row_ms=0.04, context_ms=2e-6)


@pytest.mark.parametrize(
    ("num_decoding", "num_prompts", "context", "num_rows"),
    [
        (0, 1, 0, 2048),  # nobody waits
        (64, 1, 0, 64 + 400),  # 16 ms
        (64, QUEUE, 0, 64 + 400),
        (64, QUEUE + 1, 0, 2048),
        (8, 1, 0, 8 + 800),  # few wait twice as long
        (256, 1, 0, 256 + 800),  # whose own part of the step is long
        (64, 1, 20_000, 64 + 200),  # a row costs twice as much there
        (8, 1, 10**9, 8 + 1),
        (3000, 1, 0, 2048),
    ],
)
def test_prompts_get_a_time(num_decoding: int, num_prompts: int, context: int, num_rows: int) -> None:
    assert StepBudget(2048, 1, COSTS).num_rows(num_decoding, num_prompts, context) == num_rows


def test_a_model_of_long_steps_has_four_of_them_for_prompts() -> None:
    assert StepBudget(2048, 1, PromptCosts(10.0, 0.2, 0.0)).num_rows(64, 1, 0) == 64 + 200


def test_a_device_that_takes_no_time_for_rows_has_no_limit() -> None:
    assert StepBudget(2048, 1, PromptCosts(1.0, 0.0, 0.0)).num_rows(64, 1, 5) == 2048


def test_many_rows_fill_tiles() -> None:
    assert StepBudget(2048, 192, PromptCosts(1.0, 0.016, 0.0)).num_rows(64, 1, 0) == 1152
    assert StepBudget(2048, 192, COSTS).num_rows(64, 1, 0) == 64 + 400


def of_prompts(budget: StepBudget, context: int) -> int:
    return budget.num_rows(64, 1, context) - 64


def take_steps(budget: StepBudget, num: int, context: int, row_ms: float) -> None:
    """As large as it says, of a device on which a step of 64 takes 9 ms and a row of a prompt so many."""
    for _ in range(num):
        rows = of_prompts(budget, context)
        budget.took(9.0 + rows * row_ms, 64, rows, context)


def test_what_steps_take_corrects_what_was_said() -> None:
    """A device on which a row takes as long as was said, and three times as long for what stands before it."""
    budget = StepBudget(2048, 1, COSTS)
    budget.took(9.0, 64, 0, 0.0)
    take_steps(budget, 12, 20_000, 0.04 + 6e-6 * 20_000)
    assert 16 / 0.16 * 0.9 < of_prompts(budget, 20_000) < 16 / 0.16 * 1.1
    take_steps(budget, 12, 0, 0.04)
    assert 390 < of_prompts(budget, 0) < 410


def test_one_step_with_something_else_in_it_is_forgotten() -> None:
    budget = StepBudget(2048, 1, COSTS)
    budget.took(9.0, 64, 0, 0.0)
    budget.took(5000.0, 64, 400, 0)
    assert of_prompts(budget, 0) == 266
    take_steps(budget, 8, 0, 0.04)
    assert 390 < of_prompts(budget, 0) < 410


def test_nothing_is_learnt_from_what_tells_nothing() -> None:
    """Steps as large as they may be, few rows, and many sequences of which nobody knows what they take."""
    budget = StepBudget(2048, 1, COSTS)
    budget.took(500.0, 64, 400, 0)
    budget.took(9.0, 64, 0, 0.0)
    budget.took(500.0, 64, 2048 - 64, 0)
    budget.took(500.0, 64, 60, 0)
    assert of_prompts(budget, 0) == 400


def test_costs_stay_near_what_was_said() -> None:
    budget = StepBudget(2048, 1, COSTS)
    budget.took(9.0, 64, 0, 0.0)
    for _ in range(50):
        budget.took(1000.0, 64, 200, 0)
    assert of_prompts(budget, 0) == 100
    for _ in range(50):
        budget.took(9.0, 64, 200, 0)
    assert of_prompts(budget, 0) == 1600
