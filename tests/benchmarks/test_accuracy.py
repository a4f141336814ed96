"""benchmarks/accuracy.py: what it counts, and the page that its file is on."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.support.checkpoints import random_model
from tests.support.layouts import LAYOUTS


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    return importlib.import_module("accuracy")


def test_answers_agree_up_to_the_first_other_token(accuracy: ModuleType) -> None:
    found = accuracy.agreement([[1, 2, 3], [1, 9, 3, 4], [5]], [[1, 2, 3], [1, 2, 3], [5, 6]])
    assert found == {"answers": 3, "same_answers": round(1 / 3, 4), "same_tokens": round((3 + 1 + 1) / 8, 4)}


def test_int8_is_near_and_bfloat16_nearer(accuracy: ModuleType, tmp_path: Path) -> None:
    layout = LAYOUTS["GPTQ-for-LLaMa, safetensors, act-order"]
    layout.write(tmp_path, random_model(layout.recipe))
    exact, rounded, bfloat16 = (
        accuracy.logits_of(tmp_path, dtype, list(range(60))) for dtype in ("float32", "auto", "bfloat16")
    )

    def error(logits: torch.Tensor) -> float:
        return float((logits - exact).norm() / exact.norm())

    assert 0 < error(bfloat16) < 0.01 and 0 < error(rounded) < 0.03


def test_each_answer_of_the_tests_is_asked_for(accuracy: ModuleType) -> None:
    prompts, expected = accuracy.prompts_of(accuracy.demo_chats())
    assert len(prompts) == len(expected) > 45 and accuracy.texts_of([prompts[0]]) != [""]


def test_the_page_has_the_figures_of_the_file(accuracy: ModuleType) -> None:
    told = accuracy.paragraph(json.loads(accuracy.RESULT.read_text()))
    assert accuracy.PART.holds(told), "run: python benchmarks/accuracy.py --page"
