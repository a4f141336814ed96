"""Our float32 logits against transformers' LlamaForCausalLM built from the dequantized weights, for all that varies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_api.engine.core import Engine
from gptq_api.runner.cpu.runner import CpuRunner
from gptq_api.runner.load import load_runner
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.solo import Solo, step_of
from gptq_api.scheduler.blocks import BlockManager
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.types import Add, SamplingParams, TokenLogprobs, pack_ids
from tests.support.checkpoints import RandomModel, Recipe, random_model, write_checkpoint

IDS = torch.randint(3, 96, (70,), generator=torch.Generator().manual_seed(5)).tolist()


def load(folder: Path, **settings: Any) -> CpuRunner:
    defaults = {"device": "cpu", "dtype": "float32", "kv_cache_mib": 16, "num_threads": 1}
    loaded = load_runner(LoadOptions(model_path=str(folder), **{**defaults, **settings}))
    assert isinstance(loaded, CpuRunner)
    return loaded


def all_logits(runner: CpuRunner, ids: list[int]) -> torch.Tensor:
    solo = Solo(list(ids), SamplingParams(max_tokens=1), block_table=list(range(2, 2 + -(-len(ids) // 16))))
    return runner.logits(step_of([solo], [len(ids)]), every_row=True)[0]


def check(model: RandomModel, folder: Path, ids: list[int] = IDS, **settings: Any) -> CpuRunner:
    runner = load(folder, **settings)
    expected = model.reference_logits(ids)
    assert expected.std() > 0.5
    assert (all_logits(runner, ids) - expected).abs().max() < 1e-3
    return runner


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_rope(name: str, tmp_path: Path) -> None:
    model = random_model(Recipe(rope=ROPES[name]))
    check(model, write_checkpoint(tmp_path, model))


def test_rope_in_the_dialect_of_transformers_4(tmp_path: Path) -> None:
    model = random_model(Recipe(rope=ROPES["llama3"] | {"rope_theta": 5000.0}))
    old: dict[str, Any] = {"rope_parameters": None, "rope_theta": 5000.0, "rope_scaling": {"type": "llama3", **LLAMA3}}
    check(model, write_checkpoint(tmp_path, model, **old))


def test_dynamic_rope_beyond_the_trained_length_is_that_of_the_longest_length_served(tmp_path: Path) -> None:
    model = random_model(Recipe(rope=ROPES["dynamic"], max_position_embeddings=64))
    ids = (IDS + IDS)[:96]
    check(model, write_checkpoint(tmp_path, model), ids, max_model_len=96)


SHAPES = {
    "multi-head": Recipe(num_kv_heads=4),
    "multi-query": Recipe(num_kv_heads=1),
    "wide heads": Recipe(head_dim=32),
    "24 wide heads": Recipe(head_dim=24, num_heads=8, num_kv_heads=4),
    "tied": Recipe(tie=True),
    "biases": Recipe(attention_bias=True, mlp_bias=True),
    "act-order": Recipe(act_order=True),
    "one group": Recipe(group_size=-1),
    "group 64, the last one partial": Recipe(group_size=64),
    "group 16": Recipe(group_size=16, act_order=True),
    "group 128": Recipe(group_size=128, intermediate_size=256),
    "partial and act-order": Recipe(group_size=64, act_order=True),
    "asymmetric": Recipe(sym=False),
    "asymmetric act-order": Recipe(sym=False, act_order=True),
    "2 bits": Recipe(bits=2, sym=False),
    "3 bits": Recipe(bits=3),
    "8 bits": Recipe(bits=8),
    "mixed bits": Recipe(mixed_bits={"v_proj": 8, "down_proj": 2}),
    "k ordered unlike q and v": Recipe(act_order=True, own_order=("k_proj",)),
    "quantized head": Recipe(quantize_head=True),
    "some left dense": Recipe(dense=("q_proj", "down_proj"), attention_bias=True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_quantization(name: str, tmp_path: Path) -> None:
    model = random_model(SHAPES[name])
    check(model, write_checkpoint(tmp_path, model))


@pytest.mark.parametrize("container", ["safetensors", "sharded", "pt"])
@pytest.mark.parametrize("zero_version", [1, 2])
def test_containers_and_zero_versions(container: str, zero_version: Any, tmp_path: Path) -> None:
    model = random_model(Recipe(sym=False, act_order=True))
    form = {"bits": 4, "group_size": 32, "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[zero_version]}
    check(model, write_checkpoint(tmp_path, model, container=container, zero_version=zero_version, quant_config=form))


@pytest.mark.parametrize("g_idx", ["omit", "zeros"])
def test_g_idx_absent_or_all_zeros_means_sequential(g_idx: str, tmp_path: Path) -> None:
    model = random_model(Recipe())
    check(model, write_checkpoint(tmp_path, model, g_idx=g_idx))


def test_symmetric_zeros_show_their_version_whatever_the_config_says(tmp_path: Path) -> None:
    model = random_model(Recipe())
    lies = {"bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
    check(model, write_checkpoint(tmp_path, model, zero_version=2, quant_config=lies))


def test_prefixes_old_rotary_buffers_and_biases_of_zeros_are_nothing(tmp_path: Path) -> None:
    model = random_model(Recipe())
    tensors = model.tensors()
    for name, module in model.modules.items():
        tensors[f"{name}.bias"] = torch.zeros(module.q.shape[1], dtype=torch.float16)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    check(model, write_checkpoint(tmp_path, model, tensors=prefixed))


def test_a_duplicate_head_of_a_tied_model_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(Recipe(tie=True))
    tensors = model.tensors() | {"lm_head.weight": torch.ones(96, 64, dtype=torch.float16)}
    check(model, write_checkpoint(tmp_path, model, tensors=tensors))
    assert "lm_head.weight is not used" in caplog.text


@pytest.mark.parametrize(
    "name", ["act-order", "one group", "group 64, the last one partial", "asymmetric act-order", "biases"]
)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_bfloat16_is_near(name: str, dtype: str, tmp_path: Path) -> None:
    model = random_model(replace(SHAPES[name], vocab_size=96))
    runner = load(write_checkpoint(tmp_path, model), dtype=dtype)
    assert "reference" not in runner.description
    expected = model.reference_logits(IDS)
    got = all_logits(runner, IDS)
    assert (got - expected).norm() / expected.norm() < 2e-2


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    "name", ["act-order", "one group", "group 64, the last one partial", "asymmetric act-order", "biases"]
)
def test_the_int4_operator_is_near(name: str, tmp_path: Path) -> None:
    model = random_model(replace(SHAPES[name], vocab_size=96))
    runner = load(write_checkpoint(tmp_path, model), dtype="bfloat16")
    assert "int4" in runner.description and "reference" not in runner.description
    expected = model.reference_logits(IDS)
    got = all_logits(runner, IDS)
    assert (got - expected).norm() / expected.norm() < 2e-2


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits_take_the_same_kernel(bits: int, tmp_path: Path) -> None:
    model = random_model(Recipe(bits=bits, act_order=True, sym=False))
    runner = load(write_checkpoint(tmp_path, model), dtype="bfloat16")
    assert "int4" in runner.description and "reference" not in runner.description
    expected = model.reference_logits(IDS)
    assert (all_logits(runner, IDS) - expected).norm() / expected.norm() < 2e-2


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("room", [0, None])
def test_what_the_int4_operator_does_not_take_is_dequantized_where_there_is_room(
    room: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptq_api.runner.backends.host_memory", lambda: room)
    model = random_model(Recipe(group_size=16, mixed_bits={"down_proj": 8}))
    runner = load(write_checkpoint(tmp_path, model), dtype="bfloat16")
    assert ("8 x dequantized bfloat16" if room is None else "reference: groups of 16") in runner.description
    expected = model.reference_logits(IDS)
    assert (all_logits(runner, IDS) - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("budget", [7, 512])
def test_logprobs_of_a_prompt_are_those_of_transformers(budget: int, tmp_path: Path) -> None:
    model = random_model(Recipe(act_order=True))
    runner = load(write_checkpoint(tmp_path, model))
    engine: Engine[Any] = Engine(runner, Scheduler(BlockManager(runner.num_blocks, runner.block_size), 4, budget))
    asked = SamplingParams(max_tokens=0, prompt_logprobs=5)
    engine.add(Add(1, pack_ids(IDS[::-1]), (SamplingParams(max_tokens=9, seed=3),)))
    engine.add(Add(2, pack_ids(IDS), (asked,)))
    told: list[tuple[TokenLogprobs, int]] = []
    while engine.has_work():
        output = engine.step()
        if output is not None and 2 in output.prompt_logprobs:
            told += output.prompt_logprobs[2].unpacked()
    table = model.reference_logits(IDS)[:-1].log_softmax(-1)
    chosen = table.gather(1, torch.tensor(IDS[1:])[:, None])
    assert [entry.logprob for entry, _ in told] == pytest.approx(chosen.flatten().tolist(), abs=1e-3)
    assert [rank for _, rank in told] == ((table > chosen).sum(-1) + 1).tolist()
    best = table.topk(5).values.tolist()
    for (entry, _), values in zip(told, best, strict=True):
        assert [value for _, value in entry.top] == pytest.approx(values, abs=1e-3)
