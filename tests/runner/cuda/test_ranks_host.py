"""What the host does for several ranks on CUDA, with stand-ins for the kernels and the exchange: the tokens of one,
with a draft model or an EAGLE-3 head beside the first."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_api.checkpoint.checkpoint import open_checkpoint
from gptq_api.checkpoint.dense import open_dense
from gptq_api.model.config import read_config
from gptq_api.model.eagle import EagleWeights, load_head, read_head
from gptq_api.model.loader import load_llama
from gptq_api.model.shard import WHOLE
from gptq_api.runner.cpu.backend import CpuBackend
from gptq_api.runner.cuda.cache import CudaKVCache
from gptq_api.runner.cuda.eagle import CudaEagle
from gptq_api.runner.cuda.forward import MAX_DRAFT_ROWS, CudaLlama
from gptq_api.runner.cuda.runner import CudaRunner
from gptq_api.runner.drafter import ModelDrafter
from gptq_api.runner.features import Features
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.parallel import ParallelRunner
from gptq_api.runner.ranks import Rank, RankGroup
from gptq_api.runner.solo import Solo, step_of
from gptq_api.step import DraftRequest
from gptq_api.types import SamplingParams
from tests.support import cuda_stand_ins
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.cuda_stand_ins import HostExchange
from tests.support.draft_models import NUM_BLOCKS, answers
from tests.support.eagle_heads import HeadRecipe, random_head, write_head
from tests.support.soak import NUM_SEQS, cycle, repeated

SERVED = Recipe(num_layers=8, num_kv_heads=4, max_position_embeddings=256)
SHALLOW = replace(SERVED, num_layers=3)
HEAD = HeadRecipe(SERVED)
BLOCK, ROWS = 16, 160
CPU = torch.device("cpu")
KINDS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.2}]


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    monkeypatch.setattr(CudaLlama, "max_draft_rows", MAX_DRAFT_ROWS)


class Served:
    """On so many ranks, float32; 0: without any."""

    def __init__(self, folder: Path, size: int, head: Path | None = None, num_seqs: int = 2) -> None:
        self._folder, self._head, self._num_seqs = folder, head, num_seqs
        self._config = read_config(folder)
        self._length = self._config.max_position_embeddings
        self._features: Features | None = None
        self._loaded: EagleWeights | None = None
        self.runner: LoadedRunner
        if not size:
            self.runner = first = self._rank(None)
        else:
            group = RankGroup(size)
            runners = group.run(lambda rank: self._rank(group.ranks[rank]))
            self.runner, first = ParallelRunner(group, list(runners)), runners[0]
        self.runner.drafter = self._drafter(first)

    def _rank(self, rank: Rank | None) -> CudaRunner:
        backend = CpuBackend(CPU, torch.float32)
        shard = WHOLE if rank is None else rank.shard
        weights, _ = load_llama(open_checkpoint(self._folder), self._config, self._length, backend, shard)
        features = None
        if self._head is not None and shard.rank == 0:
            config = read_head(self._head, self._config.num_hidden_layers)
            self._loaded = load_head(open_dense(self._head), config, weights, self._length, backend)
            self._features = features = Features(self._loaded, torch.float32, CPU)
            features.data = torch.zeros(features.shape(NUM_BLOCKS * BLOCK))
        exchange: Any = None if rank is None else HostExchange(rank)
        sizes = (ROWS, MAX_DRAFT_ROWS, self._length, torch.float32)
        forward = CudaLlama(weights, *sizes, features=features, exchange=exchange)
        return CudaRunner(forward, self._cache(weights.config), self._num_seqs, ROWS, self._length, 0)

    def _cache(self, config: Any) -> CudaKVCache:
        return CudaKVCache(config, NUM_BLOCKS, BLOCK, torch.float32, CPU)

    def _drafter(self, served: CudaRunner) -> ModelDrafter:
        if self._loaded is not None:
            assert self._features is not None
            sizes = (ROWS, MAX_DRAFT_ROWS, self._length, torch.float32)
            model: CudaLlama = CudaEagle(self._loaded, *sizes, self._features)
        else:
            backend = CpuBackend(CPU, torch.float32)
            weights, _ = load_llama(open_checkpoint(self._folder), self._config, self._length, backend)
            model = CudaLlama(weights, ROWS, MAX_DRAFT_ROWS, self._length, torch.float32)
        runner = CudaRunner(model, self._cache(model.config), 4, ROWS, self._length, 0, drafts_for=served)
        return ModelDrafter(runner, max_seqs=4, max_rows=ROWS, step_cost=0.1, row_cost=0.01, call_cost=0.0)


@pytest.mark.parametrize("draft", ["itself", "a head"])
def test_texts_are_those_of_one(draft: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "served", random_model(SHALLOW if draft == "itself" else SERVED))
    head = None if draft == "itself" else write_head(tmp_path / "head", random_head(HEAD))
    alone = Served(folder, 0, head).runner
    alone.drafter = None
    expected, _, _ = answers(alone, KINDS)
    for size in (2, 4):
        found, scheduler, _ = answers(Served(folder, size, head).runner, KINDS)
        assert [(one.tokens, one.finish) for one in found] == [(one.tokens, one.finish) for one in expected]
        assert scheduler.counters.draft_tokens > 0
        if draft == "itself":
            assert scheduler.counters.accepted_tokens == scheduler.counters.draft_tokens


def test_whichever_rank_is_late_every_step_has_its_bits(tmp_path: Path) -> None:
    """How a million layers are run on GPUs; and that it would tell of a rank that computes something else."""
    folder, delays = write_checkpoint(tmp_path / "served", random_model(SERVED)), [random.Random(i) for i in range(2)]
    runner: Any = Served(folder, 2, num_seqs=NUM_SEQS).runner
    steps, num_calls = cycle(20, SERVED.vocab_size, BLOCK), 0

    def before(rank: int) -> None:
        time.sleep(delays[rank].random() * 1e-3)

    def broken(rank: int) -> None:
        nonlocal num_calls
        num_calls += rank
        if num_calls == 30 and rank:
            runner.ranks[1]._model._norm[5] += 0.01

    assert repeated(runner, steps, 100, before) == (100, 0)
    done, wrong = repeated(runner, steps, 40, broken)
    assert done == 40 and wrong > 0


KEY = "eagle_aux_hidden_state_layer_ids"


@pytest.mark.parametrize("layers", [(2, 4, 5), (0, 3, 8)])
def test_a_head_reads_what_all_ranks_have_added_to_the_stream(layers: tuple[int, ...], tmp_path: Path) -> None:
    """Of a prompt in chunks, the last one a single row; 8 is what the last layer leaves."""
    model, head = random_model(SERVED), random_head(replace(HEAD, more_config={KEY: list(layers)}))
    folder, path = write_checkpoint(tmp_path / "served", model), write_head(tmp_path / "head", head)
    params, blocks = SamplingParams(max_tokens=100, temperature=0), [5, 3, 8, 1]
    text = [(7 * i + 3) % 96 for i in range(37)]
    stores, drafters = list[torch.Tensor](), list[Any]()
    for size in (2, 0):
        runner, solo = Served(folder, size, path).runner, Solo(text[:-1], params, blocks)
        for part in (20, 15, 1):
            runner.collect(runner.launch(step_of([solo], [part])))
        drafters.append(runner.drafter)
        stores.append(drafters[-1]._runner._model._store.data)
    torch.testing.assert_close(stores[0], stores[1], rtol=1e-4, atol=1e-4)
    requests = [DraftRequest(1, text, 37, params, blocks, 0, 37, 5)]
    assert drafters[0].draft(requests) == drafters[1].draft(requests)
