"""Several ranks of one model: the bits of one, on the CPU, where each rank is a thread."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from gptq_api.checkpoint.checkpoint import CheckpointError
from gptq_api.errors import ConfigError
from gptq_api.model.config import read_config
from gptq_api.model.modules import modules
from gptq_api.model.shard import Shard, outputs, refusal
from gptq_api.runner import ranks
from gptq_api.runner.load import load_runner
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.parallel import ParallelRunner
from gptq_api.runner.ranks import RankError, RankGroup
from gptq_api.runner.solo import Solo, lone_step, step_of
from gptq_api.step import DeviceMemoryError, Sampled
from gptq_api.types import SamplingParams
from tests.runner.cpu.test_equal_bits import COMPANY, NUM_BLOCKS, answers
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.server import Server

BASE = Recipe(num_heads=4, num_kv_heads=4, vocab_size=101)
"""whose head does not divide evenly"""
RECIPES = {
    "plain": BASE,
    "act-order": replace(BASE, act_order=True, sym=False),
    "an act-order of its own each": replace(BASE, act_order=True, own_order=("up_proj", "k_proj")),
    "tied": replace(BASE, tie=True),
    "quantized head": replace(BASE, quantize_head=True, vocab_size=112),
    "biases everywhere": replace(BASE, attention_bias=True, mlp_bias=True, act_order=True),
    "qwen2": replace(BASE, family="qwen2", attention_bias=True),
    "qwen3": replace(BASE, family="qwen3", head_dim=32, tie=True),
    "unquantized o and down": replace(BASE, dense=("o_proj", "down_proj")),
    "mixed bits": replace(BASE, mixed_bits={"down_proj": 8, "q_proj": 3, "up_proj": 8}),
    "uneven": replace(BASE, intermediate_size=176),
}
BLOCK = 7
"""tokens: a size for which one rank computes in torch as well, in the same order"""


def load(folder: Path | str, size: int, **settings: Any) -> LoadedRunner:
    defaults: dict[str, Any] = {"device": "cpu", "num_blocks": 40, "block_size": BLOCK, "max_num_seqs": 8}
    defaults |= {"max_model_len": 120}
    return load_runner(LoadOptions(model_path=str(folder), tensor_parallel_size=size, **{**defaults, **settings}))


def logits(runner: LoadedRunner, rows: int) -> torch.Tensor:
    solo = Solo(list(range(3, 3 + rows)), SamplingParams(max_tokens=1), list(range(20)))
    found, _ = runner.logits(step_of([solo], [rows]), every_row=True)
    return found


@pytest.mark.parametrize("dtype", ["float32", "auto"])
@pytest.mark.parametrize("name", RECIPES)
def test_logits_have_the_bits_of_one_rank(name: str, dtype: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, random_model(RECIPES[name]))
    whole = load(folder, 1, dtype=dtype)
    for size in (2, 4):
        parts = load(folder, size, dtype=dtype)
        for rows in (1, 9, 40):
            assert torch.equal(logits(parts, rows), logits(whole, rows)), (size, rows)
        assert parts.num_blocks == whole.num_blocks and parts.vocab_size == whole.vocab_size


def test_the_demo_and_its_texts_greedy_and_sampled() -> None:
    """With drafts, preemption and a prefix cache, through the engine."""
    sizes: dict[str, Any] = {"num_blocks": NUM_BLOCKS * 3, "max_num_seqs": COMPANY, "max_model_len": None}
    expected, _ = answers(load("demo", 1, **sizes), range(8), budget=200)
    found, _ = answers(load("demo", 2, **sizes), range(8), budget=200)
    assert found == expected


def test_every_output_has_one_rank(tmp_path: Path) -> None:
    config = read_config(write_checkpoint(tmp_path, random_model(replace(BASE, intermediate_size=176))))
    for size in (2, 3, 4):
        for module in modules(config):
            if module.joins == "qkv" and size == 3:
                continue
            parts = [outputs(config, module, Shard(rank, size)) for rank in range(size)]
            assert sorted(i for part in parts for each in part for i in each) == list(range(module.out_features))
    assert [len(Shard(rank, 4).of(11008)) for rank in range(4)] == [2752] * 4
    assert [len(Shard(rank, 3).of(4096)) for rank in range(3)] == [1360, 1360, 1376]


def test_what_cannot_be_shared_is_said(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, random_model(Recipe(num_heads=6, num_kv_heads=2, hidden_size=96)))
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size 3: 6 attention heads and 2 key-value.*1, 2 GPUs"):
        load(folder, 3)
    with pytest.raises(ConfigError, match=r"--draft-model demo beside --tensor-parallel-size 2.*leave one of them out"):
        load(folder, 2, draft_model="demo")
    small = replace(BASE, hidden_size=32, num_heads=8, num_kv_heads=8, intermediate_size=96)
    config = read_config(write_checkpoint(tmp_path / "small", random_model(small)))
    assert refusal(config, 4) == "32 outputs are less than 16 for each of 4 ranks"


def test_what_one_rank_alone_reads_is_told(tmp_path: Path) -> None:
    model = random_model(BASE)
    tensors = model.tensors()
    tensors["model.layers.1.mlp.up_proj.scales"][0, -1] = torch.nan
    folder = write_checkpoint(tmp_path / "nan", model, tensors=tensors)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor model\.layers\.1\.mlp\.up_proj\.scales holds NaN"
    ):
        load(folder, 4)


def test_a_warning_of_one_rank_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tied = random_model(replace(BASE, tie=True))
    tensors = tied.tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1] += 1
    load(write_checkpoint(tmp_path, tied, tensors=tensors), 4)
    assert caplog.text.count("lm_head.weight is not used: config.json ties the embedding to the head") == 1


def test_ranks_that_differ_end_the_engine() -> None:
    runner = load("demo", 2)
    assert isinstance(runner, ParallelRunner)
    launched = runner.launch(lone_step(5, 3, runner.block_size))
    (token,) = launched[0].sampled.tokens
    launched[1].sampled = Sampled([1], [token + 1])
    with pytest.raises(RankError, match=rf"rank 1 sampled \[{token + 1}\], rank 0 \[{token}\]: their memory differs"):
        runner.collect(launched)


def test_a_rank_that_fails_wakes_those_that_wait_for_it() -> None:
    runner = load("demo", 2)
    assert isinstance(runner, ParallelRunner)
    other: Any = runner.ranks[1]
    other._model.weights.layers[3].down.weight = None
    with pytest.raises(AttributeError, match="matmul"):
        runner.launch(lone_step(5, 3, runner.block_size))
    with pytest.raises(RankError, match=r"a rank stopped before: .*matmul"):
        runner.launch(lone_step(5, 3, runner.block_size))


def test_a_rank_without_memory_ends_the_step_of_all() -> None:
    runner = load("demo", 2)
    assert isinstance(runner, ParallelRunner)
    other: Any = runner.ranks[1]

    def forward(*_: Any) -> None:
        raise torch.OutOfMemoryError("2 GiB are not there")

    other._model.forward = forward
    with pytest.raises(DeviceMemoryError, match="2 GiB are not there"):
        runner.launch(lone_step(5, 3, runner.block_size))


@pytest.mark.parametrize("flag", ["--tensor-parallel-size", "--num-gpus"])
def test_a_server_with_two_ranks_answers_as_one_does(flag: str) -> None:
    question = {"messages": [{"role": "user", "content": "What is GPTQ?"}], "temperature": 0, "max_tokens": 40}
    texts = []
    for arguments in ([], [flag, "2"]):
        with Server("--block-size", str(BLOCK), "--num-blocks", "200", *arguments) as server:
            answer = httpx.post(f"{server.url}/chat/completions", json=question, timeout=60).json()
            texts.append(answer["choices"][0]["message"]["content"])
    assert texts[0] == texts[1] and "GPTQ" in texts[0]


def test_a_rank_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "STALL_S", 0.2)
    group, held = RankGroup(2), threading.Event()

    def work(rank: int) -> None:
        if rank == 0:
            try:
                group.ranks[0].meet()
            finally:
                held.set()
        else:
            held.wait(30)

    with pytest.raises(RankError, match=r"has not come for 0 s|another rank failed"):
        group.run(work)
