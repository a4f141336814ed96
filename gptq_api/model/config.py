"""config.json (and generation_config.json) of a LLaMA, as written since 2023. Parsed by us: no code from a checkpoint
is run, and a number that cannot be is refused by name before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_api.checkpoint.errors import CheckpointError
from gptq_api.checkpoint.files import read_json
from gptq_api.model.families import Family, layer_windows, read_family
from gptq_api.model.keys import Keys
from gptq_api.model.layers.rotary import RopeParameters, RopeType
from gptq_api.on_disk import is_there

_ROPE_TYPES: dict[str, RopeType] = {
    "default": "default",
    "linear": "linear",
    "dynamic": "dynamic",
    "yarn": "yarn",
    "llama3": "llama3",
}


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers of one model."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    """the longest text the checkpoint was made for, scaling included"""
    rope: RopeParameters
    windows: tuple[int | None, ...]
    """per layer: how many tokens a token sees, its own included; None: all before it"""
    attention_bias: bool
    """the config promises biases of q, k and v (and o, but for Qwen2)"""
    mlp_bias: bool
    tie_word_embeddings: bool | None
    """None: the file does not say"""
    eos_token_ids: tuple[int, ...]
    fused: frozenset[str]
    """which of "qkv" and "gate_up" are stored as one Linear; of other families than Phi-3, `as_stored` knows"""
    num_experts: int
    """of a mixture in place of the feed-forward network; 0: there is none"""
    torch_dtype: str | None

    @property
    def weights_per_layer(self) -> int:
        """of its Linears"""
        heads, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return self.hidden_size * (2 * heads + 2 * kv + 3 * self.intermediate_size)

    @property
    def kv_elements_per_token(self) -> int:
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    def ties_head(self, has_head: bool) -> bool:
        """Whether the embedding is the head. A config that does not say ties exactly where the file has no head."""
        return not has_head if self.tie_word_embeddings is None else self.tie_word_embeddings


def read_config(folder: Path) -> LlamaConfig:
    """Parse config.json and generation_config.json. CheckpointError names the file, the key and the value, or what the
    forward pass lacks for such a model."""
    path = folder / "config.json"
    if not is_there(path):
        raise CheckpointError(f"{folder} has no config.json; copy it from the model the checkpoint was made of")
    generation = folder / "generation_config.json"
    config = parse_config(read_json(path), str(path), read_json(generation) if is_there(generation) else {})
    if config.family.missing is not None:
        raise CheckpointError(f"{path}: {config.family.title} is not served: {config.family.missing}")
    return config


def parse_config(raw: dict[str, Any], source: str, generation: dict[str, Any] | None = None) -> LlamaConfig:
    """Both dialects: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (5)."""
    family = read_family(raw, source)
    keys = Keys(raw, source)
    hidden = keys.integer("hidden_size", 1, 2**17)
    heads = keys.integer("num_attention_heads", 1, 2**12)
    kv_heads = keys.integer("num_key_value_heads", 1, heads, default=heads)
    if heads % kv_heads:
        raise CheckpointError(f"{source}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if raw.get("head_dim") is None and family.head_dim is None and hidden % heads:
        raise CheckpointError(f"{source}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = keys.integer("head_dim", 2, 1024, default=family.head_dim or hidden // heads)
    if head_dim % 2:
        raise CheckpointError(f"{source}: head_dim {head_dim} is odd, which rotary embedding cannot be")
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"{source}: hidden_act {activation!r} is not LLaMA's; only silu is served")
    positions = keys.integer("max_position_embeddings", 1, 2**24, default=2048)
    positions = max(positions, keys.integer("max_sequence_length", 1, 2**24, default=positions))
    if keys.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
        raise CheckpointError(f"{source}: partial_rotary_factor {raw['partial_rotary_factor']} is not served; 1.0 is")
    rope, longest = _parse_rope(raw, source, positions)
    vocab_size = keys.integer("vocab_size", 1, 2**22)
    num_layers = keys.integer("num_hidden_layers", 1, 1024)
    return LlamaConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size", 1, 2**19),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=keys.number("rms_norm_eps", 0.0, 0.1, default=1e-6),
        max_position_embeddings=longest,
        rope=rope,
        windows=layer_windows(family, raw, source, num_layers),
        attention_bias=keys.flag("attention_bias", False) or family.qkv_bias,
        mlp_bias=keys.flag("mlp_bias", False),
        tie_word_embeddings=keys.optional_flag("tie_word_embeddings"),
        eos_token_ids=_eos(raw, source, generation or {}, vocab_size),
        fused=frozenset(("qkv", "gate_up") if family.fused else ()),
        num_experts=keys.integer("num_local_experts", 0, 1024, default=0) if family.mixture else 0,
        torch_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "") or None,
    )


def _parse_rope(raw: dict[str, Any], source: str, positions: int) -> tuple[RopeParameters, int]:
    """(rope, longest text): scaling from either dialect, `type` or `rope_type`, nothing or an empty object."""
    inner = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(inner, dict):
        raise CheckpointError(f"{source}: rope_scaling is {inner!r} where an object is expected")
    where = f"{source} (rope)"
    if any(isinstance(value, dict) for value in inner.values()):
        raise CheckpointError(f"{where}: parameters per kind of layer are not served; one set for all layers is")
    keys = Keys(inner, where)
    named = inner.get("rope_type", inner.get("type", "default"))
    if not isinstance(named, str) or named not in _ROPE_TYPES:
        raise CheckpointError(f"{where}: type {named!r} is not served; {', '.join(_ROPE_TYPES)} are")
    rope_type = _ROPE_TYPES[named]
    theta = Keys(raw, source).number("rope_theta", 1.0, 1e12, default=10000.0)
    factor = keys.number("factor", 1.0, 1e6, default=1.0)
    if rope_type not in ("default",) and inner.get("factor") is None:
        raise CheckpointError(f"{where}: type {named!r} lacks factor")
    original = keys.integer("original_max_position_embeddings", 1, 2**24, default=positions)
    attention = inner.get("attention_factor")
    rope = RopeParameters(
        theta=keys.number("rope_theta", 1.0, 1e12, default=theta),
        rope_type=rope_type,
        factor=factor,
        original_max_position_embeddings=original if rope_type != "dynamic" else positions,
        low_freq_factor=keys.number("low_freq_factor", 1e-6, 1e6, default=1.0),
        high_freq_factor=keys.number("high_freq_factor", 1e-6, 1e6, default=4.0),
        beta_fast=keys.number("beta_fast", 1e-6, 1e6, default=32.0),
        beta_slow=keys.number("beta_slow", 1e-6, 1e6, default=1.0),
        attention_factor=None if attention is None else keys.number("attention_factor", 1e-6, 1e6, default=1.0),
        mscale=keys.number("mscale", 0.0, 1e6, default=0.0) or None,
        mscale_all_dim=keys.number("mscale_all_dim", 0.0, 1e6, default=0.0) or None,
        truncate=keys.flag("truncate", True),
    )
    if rope_type == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise CheckpointError(f"{where}: high_freq_factor {rope.high_freq_factor:g} is not above low_freq_factor")
    return rope, _longest(raw, rope_type, factor, positions, original)


def _longest(raw: dict[str, Any], rope_type: RopeType, factor: float, positions: int, original: int) -> int:
    """Linear and yarn stretch the length the config names, unless it already names the stretched one."""
    if rope_type == "linear" and raw.get("max_sequence_length") is None:
        return int(positions * factor)
    if rope_type == "yarn":
        return max(positions, int(original * factor))
    return positions


def _eos(raw: dict[str, Any], source: str, generation: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """generation_config.json overrides; a list or one id. Ids outside the vocabulary can never be sampled and are
    dropped."""
    value = generation.get("eos_token_id")
    if value is None:
        value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{source}: eos_token_id is {value!r} where an id or a list of ids is expected")
    return tuple(dict.fromkeys(i for i in ids if 0 <= i < vocab_size))
