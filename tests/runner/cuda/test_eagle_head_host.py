"""What the host does for an EAGLE-3 head on CUDA, with stand-ins for the kernels: it computes what the published
description says, and the texts are those of a model without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_api.checkpoint.checkpoint import open_checkpoint
from gptq_api.checkpoint.dense import open_dense
from gptq_api.model.config import read_config
from gptq_api.model.eagle import load_head, read_head
from gptq_api.model.loader import load_llama
from gptq_api.runner.cpu.backend import CpuBackend
from gptq_api.runner.cuda.cache import CudaKVCache
from gptq_api.runner.cuda.eagle import CudaEagle
from gptq_api.runner.cuda.forward import MAX_DRAFT_ROWS, CudaLlama
from gptq_api.runner.cuda.runner import CudaRunner
from gptq_api.runner.drafter import ModelDrafter
from gptq_api.runner.features import Features
from gptq_api.runner.solo import Solo, step_of
from gptq_api.step import DraftRequest
from gptq_api.types import SamplingParams
from tests.support import cuda_stand_ins
from tests.support.checkpoints import RandomModel, Recipe, random_model, write_checkpoint
from tests.support.draft_models import NUM_BLOCKS, answers
from tests.support.eagle_heads import HeadRecipe, RandomHead, random_head, write_head

SERVED = Recipe(num_layers=8, max_position_embeddings=256)
HEAD = HeadRecipe(SERVED)
BLOCK, ROWS = 16, 64
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    monkeypatch.setattr(CudaLlama, "max_draft_rows", MAX_DRAFT_ROWS)


def served_and_head(folder: Path, head: Path | None, num_seqs: int) -> CudaRunner:
    """float32."""
    config, backend = read_config(folder), CpuBackend(CPU, torch.float32)
    length = config.max_position_embeddings
    weights, _ = load_llama(open_checkpoint(folder), config, length, backend)
    features = None
    if head is not None:
        loaded = load_head(open_dense(head), read_head(head, config.num_hidden_layers), weights, length, backend)
        features = Features(loaded, torch.float32, CPU)
        features.data = torch.zeros(features.shape(NUM_BLOCKS * BLOCK))
    sizes = (ROWS, max(num_seqs, MAX_DRAFT_ROWS), length, torch.float32)
    cache = CudaKVCache(config, NUM_BLOCKS, BLOCK, torch.float32, CPU)
    forward = CudaLlama(weights, *sizes, features=features)
    served = CudaRunner(forward, cache, num_seqs, ROWS, length, 0)
    if head is not None:
        assert features is not None
        model = CudaEagle(loaded, ROWS, MAX_DRAFT_ROWS, length, torch.float32, features)
        of_head = CudaKVCache(loaded.llama.config, NUM_BLOCKS, BLOCK, torch.float32, CPU)
        runner = CudaRunner(model, of_head, 4, ROWS, length, 0, drafts_for=served)
        costs = {"step_cost": 0.1, "row_cost": 0.01, "call_cost": 0.0}
        served.drafter = ModelDrafter(runner, max_seqs=4, max_rows=ROWS, **costs)
    return served


def made(tmp_path: Path, recipe: HeadRecipe) -> tuple[Path, Path, RandomModel, RandomHead]:
    model, head = random_model(SERVED), random_head(recipe)
    return write_checkpoint(tmp_path / "served", model), write_head(tmp_path / "head", head), model, head


@pytest.mark.parametrize("preempts", [False, True])
def test_a_head_changes_no_text(preempts: bool, tmp_path: Path) -> None:
    """Twice, where nobody is preempted: behind a cached prefix."""
    folder, head, _, _ = made(tmp_path, HEAD)
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.0, "top_logprobs": 1}]
    plain, _, _ = answers(served_and_head(folder, None, 2), kinds)
    ways: dict[str, Any] = {"preempts": preempts, "times": 1 if preempts else 2}
    drafted, scheduler, _ = answers(served_and_head(folder, head, 2), kinds, **ways)
    assert [(one.tokens, one.finish) for one in drafted] == [(one.tokens, one.finish) for one in plain]
    assert scheduler.counters.draft_tokens > 0


KEY = "eagle_aux_hidden_state_layer_ids"
HEADS: dict[str, tuple[HeadRecipe, tuple[int, ...]]] = {
    "as published": (HEAD, (2, 4, 5)),
    "all tokens": (replace(HEAD, draft_vocab_size=96, hidden_size=32, has_embedding=True), (2, 4, 5)),
    "the normed feature goes on": (replace(HEAD, norm_before_residual=True, more_config={KEY: [0, 3, 7]}), (0, 3, 7)),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_guesses_what_its_description_says(kind: str, tmp_path: Path) -> None:
    """A prompt in chunks, several guesses, and again when the served model has gone on, one wrong guess in it."""
    recipe, layers = HEADS[kind]
    folder, path, model, head = made(tmp_path, recipe)
    runner = served_and_head(folder, path, 2)
    params, blocks = SamplingParams(max_tokens=100, temperature=0), [5, 3, 8, 1]
    text = [(7 * i + 3) % 96 for i in range(37)]
    reference = model.reference().model

    def expected(tokens: list[int], num: int) -> list[int]:
        with torch.no_grad():
            out = reference(torch.tensor([tokens[:-1]]), output_hidden_states=True)
        hidden = torch.cat([out.hidden_states[layer][0] for layer in layers], -1)
        return head.guesses(model.dense["model.embed_tokens.weight"], hidden, tokens, num)[1]

    drafter: Any = runner.drafter
    solo = Solo(text[:-1], params, blocks)
    for part in (20, 15, 1):
        runner.collect(runner.launch(step_of([solo], [part])))
    assert drafter.draft([DraftRequest(1, text, 37, params, blocks, 0, 20, 0)]) == [[]]
    [first] = drafter.draft([DraftRequest(1, text, 37, params, blocks, 20, 17, 5)])
    assert first == expected(text, 5)
    more = [*text, first[0], 11]
    again = Solo(list(more), params, blocks)
    again.num_computed_tokens = 36
    runner.collect(runner.launch(step_of([again], [2])))
    [second] = drafter.draft([DraftRequest(1, more, 37, params, blocks, 37, 2, 4)])
    assert second == expected(more, 4)
