"""An EAGLE-3 head on a CUDA device: the tokens and logprobs of a model without one, bit for bit; what it computes, in
graphs and without; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_api.errors import UserError
from gptq_api.kernels import gemm
from gptq_api.runner.solo import Solo, step_of
from gptq_api.step import DraftRequest
from gptq_api.types import SamplingParams
from tests.runner.cuda.test_model import WIDE
from tests.support.checkpoints import RandomModel, random_model, write_checkpoint
from tests.support.draft_models import KINDS, answers
from tests.support.draft_models import on_cuda as load
from tests.support.eagle_heads import HeadRecipe, RandomHead, random_head, write_head

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available"),
]
KEY = "eagle_aux_hidden_state_layer_ids"
SERVED = replace(WIDE, num_layers=8, act_order=True)
HEAD = HeadRecipe(SERVED, draft_vocab_size=200, num_heads=8, num_kv_heads=4, head_dim=128, intermediate_size=1536)
HEADS: dict[str, HeadRecipe] = {
    "as published": HEAD,
    "heads of 64, all tokens, its own embedding, few positions": replace(
        HEAD,
        draft_vocab_size=512,
        num_heads=4,
        num_kv_heads=1,
        head_dim=64,
        has_embedding=True,
        more_config={"max_position_embeddings": 120},
    ),
    "narrower, the normed feature goes on, layers by name": replace(
        HEAD, hidden_size=512, has_embedding=True, norm_before_residual=True, more_config={KEY: [0, 3, 8]}
    ),
}
LAYERS = {"as published": (2, 4, 5)}
GREEDY = SamplingParams(max_tokens=100, temperature=0)


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return random_model(SERVED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: RandomModel) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("served"), model)


@pytest.mark.parametrize("preempts", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_changes_no_bit(folder: Path, kind: str, preempts: bool, tmp_path: Path) -> None:
    """Twice, so that the second time finds its prefixes in both caches."""
    head = write_head(tmp_path / "head", random_head(HEADS[kind]))
    ways: dict[str, Any] = {"preempts": preempts, "times": 1 if preempts else 2}
    plain, _, _ = answers(load(folder, batch_invariant=True), KINDS, **ways)
    drafted, scheduler, _ = answers(load(folder, head, batch_invariant=True), KINDS, **ways)
    assert [one.tokens for one in drafted] == [one.tokens for one in plain]
    assert drafted == plain
    assert scheduler.counters.draft_tokens > 0


@pytest.mark.parametrize("settings", [{}, {"kv_cache_dtype": "fp8"}, {"dtype": "bfloat16"}], ids=str)
def test_one_alone_keeps_its_bits_without_batch_invariant(
    folder: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    head = write_head(tmp_path / "head", random_head(HEAD))
    runner, plain = load(folder, head, **settings), load(folder, **settings)
    assert runner.drafter is not None and runner.drafter.step_cost > 0 and runner.drafter.ahead == 1
    assert "EAGLE-3 head for 200 tokens, reads the stream before layers 2, 4, 5" in runner.description
    for kind in KINDS:
        (drafted, scheduler, _), (expected, _, _) = answers(runner, [kind]), answers(plain, [kind])
        assert drafted == expected, kind
        assert scheduler.counters.draft_tokens > 0


def hidden_of(reference: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        out = reference(torch.tensor([tokens]), output_hidden_states=True)
    return torch.cat([out.hidden_states[layer][0] for layer in LAYERS["as published"]], -1)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """float16 through five layers against float32."""
    assert float((found.float().cpu() - expected).abs().max()) < 0.03 * float(expected.abs().max())


def guesses_match(found: list[int], head: RandomHead, logits: torch.Tensor) -> int:
    """How many were looked at, up to a near tie."""
    for i, row in enumerate(logits):
        (best, second), (chosen, _) = row.topk(2)
        if float(best - second) < 0.03 * float(row.abs().max()):
            return i
        assert found[i] == int(head.target_ids[chosen]), i
    return len(logits)


def test_a_head_computes_what_its_description_says(folder: Path, model: RandomModel, tmp_path: Path) -> None:
    """A prompt in chunks, rows that were decoded one by one in a graph, guesses from graphs, and a wrong guess."""
    head, num_looked_at, reference = random_head(HEAD), 0, model.reference().model
    runner = load(folder, write_head(tmp_path / "head", head))
    drafter: Any = runner.drafter
    features: Any = runner._model._features
    embedding = model.dense["model.embed_tokens.weight"]
    for seed in range(6):
        text = torch.randint(3, 512, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
        blocks = [5, 3, 8, 1, 12, 13]
        solo = Solo(text[:-1], GREEDY, blocks)
        for part in (20, 33, 1, 1, 1, 1, 1, 1):
            runner.collect(runner.launch(step_of([solo], [part])))
        hidden = hidden_of(reference, text[:-1])
        slots = [blocks[i // 16] * 16 + i % 16 for i in range(59)]
        close(features.data[1:][slots], hidden @ head.tensors["fc.weight"].float().t())
        logits, _ = head.guesses(embedding, hidden, text, 5)
        key = 10 * seed
        assert drafter.draft([DraftRequest(key, text, 60, GREEDY, blocks, 0, 30, 0)]) == [[]]
        [first] = drafter.draft([DraftRequest(key, text, 60, GREEDY, blocks, 30, 30, 5)])
        [once_more] = drafter.draft([DraftRequest(key, text, 60, GREEDY, blocks, 59, 1, 5)])
        assert first == once_more and len(first) == 5
        num_looked_at += guesses_match(first, head, logits)
        more = [*text, first[0], 11]
        again = Solo(list(more), GREEDY, blocks)
        again.num_computed_tokens = 59
        runner.collect(runner.launch(step_of([again], [2])))
        logits, _ = head.guesses(embedding, hidden_of(reference, more[:-1]), more, 3)
        [second] = drafter.draft([DraftRequest(key, more, 60, GREEDY, blocks, 60, 2, 3)])
        num_looked_at += guesses_match(second, head, logits)
    assert num_looked_at > 6


def test_heads_that_the_kernels_do_not_take_are_refused(folder: Path, tmp_path: Path) -> None:
    odd = write_head(tmp_path / "odd", random_head(replace(HEAD, head_dim=48)))
    with pytest.raises(UserError, match=r"--draft-model .*: the CUDA kernels do not serve it"):
        load(folder, odd)


def test_numbers_that_are_not_finite_end_the_drafts_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    plain, _, _ = answers(load(folder, batch_invariant=True), KINDS)
    head = write_head(tmp_path / "head", random_head(replace(HEAD, has_embedding=True)))
    runner = load(folder, head, batch_invariant=True)
    drafter: Any = runner.drafter
    drafter._runner._model._embedding[60:] = torch.nan
    drafted, _, _ = answers(runner, KINDS)
    assert drafted == plain
    assert all(bool(torch.isfinite(layer).all()) for layer in runner._cache.layers)
