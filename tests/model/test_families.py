"""The families beside LLaMA, each against its own class in transformers, in float32: biases, norms of q and k, and
contexts longer than a sliding window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_api.checkpoint.checkpoint import CheckpointError
from gptq_api.cli.inspect import inspect
from gptq_api.config import InspectSettings
from gptq_api.model.config import parse_config
from gptq_api.runner.solo import Solo, step_of
from gptq_api.types import SamplingParams
from tests.model.test_agreement import all_logits, load
from tests.model.test_config import LLAMA1
from tests.support.checkpoints import RandomModel, Recipe, random_model, write_checkpoint

LONG = torch.randint(3, 96, (700,), generator=torch.Generator().manual_seed(9)).tolist()
"""longer than what torch's attention takes at a time (512), so that whole pieces of it lie before the window"""
SHORT = LONG[:60]
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}

PHI = {"pad_token_id": 0, "original_max_position_embeddings": 256}
FAMILIES: dict[str, tuple[Recipe, list[int]]] = {
    "mistral": (Recipe(family="mistral", more_config={"sliding_window": None}), SHORT),
    "mistral v0.1": (
        Recipe(family="mistral", max_position_embeddings=1024, more_config={"sliding_window": 100}),
        LONG,
    ),
    "phi3": (Recipe(family="phi3", act_order=True, more_config=PHI), SHORT),
    "phi3, window": (
        Recipe(family="phi3", max_position_embeddings=1024, sym=False, more_config={**PHI, "sliding_window": 100}),
        LONG,
    ),
    "qwen2": (Recipe(family="qwen2", act_order=True), SHORT),
    "qwen2 tied": (Recipe(family="qwen2", tie=True), SHORT),
    "qwen2, window given but not used": (
        Recipe(family="qwen2", more_config=QWEN_WINDOW | {"use_sliding_window": False}),
        SHORT,
    ),
    "qwen2, window in the upper layers": (
        Recipe(family="qwen2", num_layers=3, max_position_embeddings=1024, more_config=QWEN_WINDOW),
        LONG,
    ),
    "qwen3": (Recipe(family="qwen3", head_dim=32, sym=False, act_order=True), SHORT),
    "qwen3, window, tied": (
        Recipe(family="qwen3", head_dim=32, num_layers=3, tie=True, more_config=QWEN_WINDOW),
        SHORT,
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    recipe, ids = FAMILIES[name]
    model = random_model(recipe)
    runner = load(write_checkpoint(tmp_path, model))
    expected = model.reference_logits(ids)
    assert expected.std() > 0.5
    assert (all_logits(runner, ids) - expected).abs().max() < 1e-3
    assert model.reference().config.model_type in runner.description.lower().replace("phi-3", "phi3")


@pytest.fixture(scope="module")
def windowed() -> RandomModel:
    return random_model(Recipe(family="mistral", max_position_embeddings=1024, more_config={"sliding_window": 100}))


def test_a_window_matters(windowed: RandomModel, tmp_path: Path) -> None:
    """Else the tests above would not see one that is ignored."""
    runner = load(write_checkpoint(tmp_path, windowed, sliding_window=1024))
    difference = (all_logits(runner, LONG) - windowed.reference_logits(LONG)).abs().amax(-1)
    assert difference[:100].max() < 1e-3 < 0.1 < difference[-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_in_a_window_is_the_same_in_chunks_and_in_company(
    dtype: str, windowed: RandomModel, tmp_path: Path
) -> None:
    runner = load(write_checkpoint(tmp_path, windowed), dtype=dtype)
    ids = LONG[:650]
    whole = all_logits(runner, ids)[-1]
    table = list(range(100, 100 + 41))
    one = Solo(list(ids), SamplingParams(max_tokens=1), block_table=table)
    for n in (1, 200, 320, 128):
        runner.logits(step_of([one], [n]))
    assert one.num_computed_tokens == 649
    others = [
        Solo(LONG[: 90 * i + 1], SamplingParams(max_tokens=1), block_table=list(range(50 * i, 50 * i + 30)), seat=i)
        for i in (3, 4, 5)
    ]
    got, _ = runner.logits(step_of([*others, one], [len(s.token_ids) for s in others] + [1]))
    assert torch.equal(got[-1], whole)


def windows(**change: Any) -> tuple[int | None, ...]:
    return parse_config(LLAMA1 | {"num_hidden_layers": 4} | change, "config.json").windows


def test_which_layers_have_a_window() -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert windows(**mistral) == (4096,) * 4
    assert windows(**mistral, sliding_window=None) == (None,) * 4
    assert windows(**mistral, sliding_window=1024) == (1024,) * 4
    assert windows(sliding_window=1024) == (None,) * 4
    for qwen in ({"architectures": ["Qwen2ForCausalLM"]}, {"architectures": None, "model_type": "qwen3"}):
        given = {**qwen, "sliding_window": 64}
        assert windows(**qwen) == windows(**given) == (None,) * 4
        assert windows(**given, use_sliding_window=False, max_window_layers=0) == (None,) * 4
        assert windows(**given, use_sliding_window=True, max_window_layers=3) == (None, None, None, 64)
        assert windows(**given, use_sliding_window=True) == (None,) * 4
        kinds = ["sliding_attention", "full_attention"] * 2
        assert windows(**given, use_sliding_window=True, layer_types=kinds) == (64, None, 64, None)
        with pytest.raises(CheckpointError, match="'chunked_attention', which is not served"):
            windows(**given, use_sliding_window=True, layer_types=["chunked_attention"] * 4)
        with pytest.raises(CheckpointError, match="does not name 4 layers"):
            windows(**given, use_sliding_window=True, layer_types=[])


def test_defaults_of_the_families() -> None:
    qwen3 = parse_config(LLAMA1 | {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024}, "config.json")
    assert (qwen3.head_dim, qwen3.attention_bias, qwen3.family.qk_norm) == (128, False, True)
    qwen2 = parse_config(LLAMA1 | {"architectures": ["Qwen2ForCausalLM"]}, "config.json")
    assert qwen2.attention_bias and not qwen2.family.qk_norm and qwen2.head_dim == 128


@pytest.mark.parametrize(
    ("recipe", "missing"),
    [
        (Recipe(family="qwen2", num_layers=1), "self_attn.k_proj.bias"),
        (Recipe(attention_bias=True, num_layers=1), "self_attn.v_proj.bias"),
        (Recipe(family="qwen3", num_layers=1), "self_attn.q_norm.weight"),
    ],
)
def test_what_a_family_needs_is_missed_by_name(recipe: Recipe, missing: str, tmp_path: Path) -> None:
    model = random_model(recipe)
    tensors = model.tensors()
    del tensors[f"model.layers.0.{missing}"]
    with pytest.raises(CheckpointError, match=rf"model.layers.0.{missing} is missing"):
        load(write_checkpoint(tmp_path, model, tensors=tensors))


def _fused(tensors: dict[str, torch.Tensor], joints: dict[str, tuple[str, ...]]) -> dict[str, torch.Tensor]:
    """Outputs side by side, as some programs save what they run; g_idx is one for all."""
    for layer in range(2):
        for one, names in joints.items():
            for part in ("qweight", "qzeros", "scales", "weight"):
                whole = [f"model.layers.{layer}.{name}.{part}" for name in names]
                if whole[0] in tensors:
                    found = [tensors.pop(name) for name in whole]
                    tensors[f"model.layers.{layer}.{one}.{part}"] = torch.cat(found, 0 if part == "weight" else 1)
            g_idx = [tensors.pop(f"model.layers.{layer}.{name}.g_idx", None) for name in names]
            if g_idx[0] is not None:
                tensors[f"model.layers.{layer}.{one}.g_idx"] = g_idx[0]
    return tensors


QKV = {"self_attn.qkv_proj": tuple(f"self_attn.{part}_proj" for part in "qkv")}
GATE_UP = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}


@pytest.mark.parametrize("joints", [QKV, GATE_UP, QKV | GATE_UP], ids=["qkv", "gate_up", "both"])
@pytest.mark.parametrize("dense", [(), ("gate_proj", "up_proj")], ids=["quantized", "partly"])
def test_a_llama_may_have_its_linears_fused(
    joints: dict[str, tuple[str, ...]], dense: tuple[str, ...], tmp_path: Path
) -> None:
    model = random_model(Recipe(act_order=True, sym=False, dense=dense))
    folder = write_checkpoint(tmp_path, model, tensors=_fused(model.tensors(), joints))
    assert (all_logits(load(folder), SHORT) - model.reference_logits(SHORT)).abs().max() < 1e-3
    facts = inspect(InspectSettings(model_path=str(folder), device="cpu"))
    assert {name.rpartition(".")[2] for name in joints} <= set(facts["paths"])
    assert facts["quantization"]["modules"] == sum(
        name.endswith(".qweight") for name in _fused(model.tensors(), joints)
    )
