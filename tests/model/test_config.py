"""config.json in its dialects, and numbers that cannot be."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_api.checkpoint.checkpoint import CheckpointError
from gptq_api.model.config import LlamaConfig, parse_config

LLAMA1 = {
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_sequence_length": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-06,
    "vocab_size": 32000,
}
LLAMA31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA31 = LLAMA1 | {
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "max_sequence_length": None,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA31_ROPE,
    "eos_token_id": [128001, 128008, 128009],
    "vocab_size": 128256,
}


def parse(raw: dict[str, Any], generation: dict[str, Any] | None = None) -> LlamaConfig:
    return parse_config(raw, "config.json", generation)


def test_llama_1() -> None:
    config = parse(LLAMA1)
    assert (config.num_key_value_heads, config.head_dim, config.max_position_embeddings) == (32, 128, 2048)
    assert config.rope.theta == 10000.0 and config.rope.rope_type == "default"
    assert config.eos_token_ids == (1,) and not config.tie_word_embeddings
    assert config.kv_elements_per_token == 2 * 32 * 32 * 128


def test_llama_3_in_both_dialects() -> None:
    old = parse(LLAMA31)
    new = parse(
        {k: v for k, v in LLAMA31.items() if k not in ("rope_theta", "rope_scaling")}
        | {"rope_parameters": LLAMA31_ROPE | {"rope_theta": 500000.0}}
    )
    assert old == new
    assert old.rope.rope_type == "llama3" and old.rope.theta == 500000.0 and old.rope.factor == 8.0
    assert old.eos_token_ids == (128001, 128008, 128009)


def test_generation_config_overrides_eos() -> None:
    assert parse(LLAMA31, {"eos_token_id": 128009}).eos_token_ids == (128009,)
    assert parse(LLAMA31, {"eos_token_id": [7, 7, 10**9]}).eos_token_ids == (7,)
    assert parse(LLAMA31 | {"eos_token_id": None}).eos_token_ids == ()


@pytest.mark.parametrize(
    ("change", "longest"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 4096}, 16384),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, "max_sequence_length": 16384}, 16384),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 2048}, 2048),
        ({"rope_scaling": {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}}, 65536),
        ({"rope_scaling": LLAMA31_ROPE, "max_position_embeddings": 131072}, 131072),
        ({"rope_scaling": {}, "max_position_embeddings": 4096}, 4096),
        ({"rope_scaling": None, "max_position_embeddings": 4096}, 4096),
    ],
)
def test_the_longest_text(change: dict[str, Any], longest: int) -> None:
    base = {k: v for k, v in LLAMA1.items() if k != "max_sequence_length"}
    assert parse(base | change).max_position_embeddings == longest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "'GemmaForCausalLM' is not served"),
        ({"architectures": None, "model_type": "gemma"}, "'gemma' is not served"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 4097}, "no multiple of num_attention_heads"),
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, "no multiple of num_key_value_heads"),
        ({"num_key_value_heads": 64}, "num_key_value_heads is 64"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_scaling": {"type": "longrope", "factor": 4}}, "'longrope' is not served"),
        ({"rope_scaling": {"type": ["x"]}}, "['x'] is not served"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor is inf"),
        ({"rope_scaling": LLAMA31_ROPE | {"high_freq_factor": 0.5}}, "not above low_freq_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "parameters per kind of layer are not served"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not served"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(LLAMA1 | change)
    assert words in str(caught.value) and str(caught.value).startswith("config.json")


values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers()))
keys = st.sampled_from(sorted({*LLAMA1, "head_dim", "rope_theta", "rope_scaling", "num_key_value_heads"}))


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(keys, st.one_of(values, st.dictionaries(st.sampled_from(sorted(LLAMA31_ROPE)), values)), max_size=4)
)
def test_any_json_parses_or_is_refused(change: dict[str, Any]) -> None:
    with contextlib.suppress(CheckpointError):
        parse(LLAMA1 | change)
