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
