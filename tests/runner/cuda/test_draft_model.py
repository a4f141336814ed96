"""A draft model on a CUDA device: the tokens and logprobs of a model without one, bit for bit, in fewer steps where it
is right; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_api.errors import UserError
from gptq_api.kernels import gemm
from tests.runner.cuda.test_model import FAST, WIDE
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.draft_models import KINDS, NUM_BLOCKS, answers
from tests.support.draft_models import on_cuda as load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available"),
]
SERVED = replace(WIDE, act_order=True)
DRAFTS: dict[str, Recipe] = {
    "itself": SERVED,
    "another": replace(FAST, seed=3),
    "unquantized, few positions": replace(
        FAST, seed=4, num_layers=1, dense=("_proj",), float_dtype=torch.bfloat16, max_position_embeddings=120
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("served"), random_model(SERVED))


@pytest.mark.parametrize("preempts", [False, True])
@pytest.mark.parametrize("draft", DRAFTS)
def test_a_draft_model_changes_no_bit(folder: Path, draft: str, preempts: bool, tmp_path: Path) -> None:
    """Twice, so that the second time finds its prefixes in both caches."""
    other = write_checkpoint(tmp_path / "draft", random_model(DRAFTS[draft]))
    ways: dict[str, Any] = {"preempts": preempts, "times": 1 if preempts else 2}
    plain, _, num_plain = answers(load(folder, batch_invariant=True), KINDS, **ways)
    drafted, scheduler, num_steps = answers(load(folder, other, batch_invariant=True), KINDS, **ways)
    assert [one.tokens for one in drafted] == [one.tokens for one in plain]
    assert drafted == plain
    assert scheduler.counters.draft_tokens > 0
    if draft == "itself" and not preempts:
        assert scheduler.counters.accepted_tokens > 0.9 * scheduler.counters.draft_tokens
        assert num_steps < 0.7 * num_plain


def test_one_alone_keeps_its_bits_without_batch_invariant(folder: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "draft", random_model(DRAFTS["another"]))
    for draft in (folder, other):
        runner, plain = load(folder, draft), load(folder)
        assert runner.drafter is not None and runner.drafter.step_cost > 0 and runner.drafter.call_cost > 0
        assert runner.num_blocks == NUM_BLOCKS and "; draft model " in runner.description
        for kind in KINDS:
            (drafted, _, _), (expected, _, _) = answers(runner, [kind]), answers(plain, [kind])
            assert drafted == expected, kind


def test_heads_that_the_kernels_do_not_take_are_refused(folder: Path, tmp_path: Path) -> None:
    odd = write_checkpoint(tmp_path / "odd", random_model(replace(FAST, head_dim=48)))
    with pytest.raises(UserError, match=r"--draft-model .*: the CUDA kernels do not serve it"):
        load(folder, odd)


def test_a_model_that_takes_no_drafts_is_told(tmp_path: Path) -> None:
    dense = write_checkpoint(tmp_path / "dense", random_model(replace(FAST, dense=("down_proj",))))
    with pytest.raises(UserError, match="drafts would change its tokens"):
        load(dense, dense)


def test_numbers_that_are_not_finite_end_the_drafts_and_nothing_else(folder: Path) -> None:
    plain, _, _ = answers(load(folder, batch_invariant=True), KINDS)
    runner = load(folder, folder, batch_invariant=True)
    drafter: Any = runner.drafter
    drafter._runner._model._embedding[60:] = torch.nan
    drafted, _, _ = answers(runner, KINDS)
    assert drafted == plain
    assert all(bool(torch.isfinite(layer).all()) for layer in runner._cache.layers)
