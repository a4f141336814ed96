"""What the host does for a draft model on CUDA, with stand-ins for the kernels: the texts of a model without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_api.checkpoint.checkpoint import open_checkpoint
from gptq_api.model.config import read_config
from gptq_api.model.loader import load_llama
from gptq_api.runner.cpu.backend import CpuBackend
from gptq_api.runner.cuda.cache import CudaKVCache
from gptq_api.runner.cuda.forward import MAX_DRAFT_ROWS, CudaLlama
from gptq_api.runner.cuda.runner import CudaRunner
from gptq_api.runner.drafter import ModelDrafter
from tests.support import cuda_stand_ins
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.draft_models import NUM_BLOCKS, answers

SERVED = Recipe(max_position_embeddings=256)
SMALL = replace(SERVED, seed=1, num_layers=1, num_kv_heads=1, max_position_embeddings=120)
BLOCK, ROWS = 16, 64
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    monkeypatch.setattr(CudaLlama, "max_draft_rows", MAX_DRAFT_ROWS)


def runner_of(folder: Path, num_seqs: int, drafts_for: CudaRunner | None = None) -> CudaRunner:
    """float32."""
    config = read_config(folder)
    length = config.max_position_embeddings
    model, _ = load_llama(open_checkpoint(folder), config, length, CpuBackend(CPU, torch.float32))
    cache = CudaKVCache(config, NUM_BLOCKS, BLOCK, torch.float32, CPU)
    forward = CudaLlama(model, ROWS, max(num_seqs, MAX_DRAFT_ROWS), length, torch.float32)
    return CudaRunner(forward, cache, num_seqs, ROWS, length, 0, drafts_for)


@pytest.mark.parametrize("preempts", [False, True])
@pytest.mark.parametrize("draft", ["itself", "another one"])
def test_a_draft_model_changes_no_text(draft: str, preempts: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "served", random_model(SERVED))
    other = folder if draft == "itself" else write_checkpoint(tmp_path / "small", random_model(SMALL))
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.0, "top_logprobs": 1}]
    plain, _, num_plain = answers(runner_of(folder, 2), kinds, preempts=preempts)
    served = runner_of(folder, 2)
    small = runner_of(other, 4, drafts_for=served)
    assert small.max_draft_rows == 0 and small.stream is served.stream
    costs = {"step_cost": 0.1, "row_cost": 0.01, "call_cost": 0.0}
    served.drafter = ModelDrafter(small, max_seqs=4, max_rows=ROWS, **costs)
    drafted, scheduler, num_steps = answers(served, kinds, preempts=preempts)
    assert [(one.tokens, one.finish) for one in drafted] == [(one.tokens, one.finish) for one in plain]
    assert scheduler.counters.draft_tokens > 0
    if draft == "itself":
        assert scheduler.counters.accepted_tokens > 0.95 * scheduler.counters.draft_tokens
        assert preempts or num_steps < 0.6 * num_plain
