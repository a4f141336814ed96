"""The table of a model's Linears against transformers' models, and that it is a seam."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_api.checkpoint.errors import CheckpointError
from gptq_api.cli.inspect import inspect
from gptq_api.config import InspectSettings
from gptq_api.model.config import parse_config, read_config
from gptq_api.model.modules import all_modules, modules, parts

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "phi3": ("Phi3ForCausalLM", {"pad_token_id": 0}),
}


def raw(family: str) -> dict[str, Any]:
    architecture, more = FAMILIES[family]
    return {**SIZES, **more, "architectures": [architecture], "model_type": family}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_sizes_are_those_of_transformers(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family][1])
    with torch.device("meta"):
        make: Any = AutoModelForCausalLM.from_config
        model = make(config)
    theirs = {
        name.removesuffix(".weight"): tuple(p.shape)
        for name, p in model.named_parameters()
        if p.dim() == 2 and ".layers." in name
    }
    ours = dict(all_modules(parse_config(raw(family), "config.json")))
    assert {name: (module.out_features, module.in_features) for name, module in ours.items()} == theirs
    biased = {name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith("proj.bias")}
    assert {name for name, module in ours.items() if module.has_bias} <= biased


def test_what_is_merged_and_how_ranks_would_share_it() -> None:
    config = parse_config(raw("llama"), "config.json")
    found = {m.joins: [part.name.rsplit(".")[-1] for part in parts(config, m.joins)] for m in modules(config)}
    assert found == {
        "qkv": ["q_proj", "k_proj", "v_proj"],
        "o": ["o_proj"],
        "gate_up": ["gate_proj", "up_proj"],
        "down": ["down_proj"],
    }
    split = {m.joins: m.split for m in modules(config)}
    assert split == {"qkv": "columns", "o": "rows", "gate_up": "columns", "down": "rows"}


def test_a_mixture_of_experts_has_a_table_and_is_refused_by_what_is_missing(tmp_path: Path) -> None:
    """Names and sizes as Mixtral's checkpoints have them; what is missing is the forward pass, not the table."""
    mixtral = {
        **SIZES,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    table = {m.name: (m.out_features, m.in_features) for m in modules(parse_config(mixtral, "config.json"))}
    assert len(table) == 4 + 1 + 8 * 3
    assert table["block_sparse_moe.gate"] == (8, 64)
    assert table["block_sparse_moe.experts.7.w1"] == table["block_sparse_moe.experts.7.w3"] == (96, 64)
    assert table["block_sparse_moe.experts.0.w2"] == (64, 96)
    (tmp_path / "config.json").write_text(json.dumps(mixtral))
    with pytest.raises(CheckpointError, match=r"Mixtral is not served: there is no router"):
        read_config(tmp_path)


def test_inspect_says_what_a_mixture_lacks(tmp_path: Path) -> None:
    from tests.support.checkpoints import Recipe, random_model, write_checkpoint

    folder = write_checkpoint(
        tmp_path, random_model(Recipe()), architectures=["MixtralForCausalLM"], num_local_experts=8
    )
    with pytest.raises(CheckpointError, match="no router that sends each token to two of its experts"):
        inspect(InspectSettings(model_path=str(folder), device="cpu"))
