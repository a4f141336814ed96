"""The model families whose forward pass is ours, and in what each departs from LLaMA: biases, norms of q and k,
which layers see only a window of the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gptq_api.checkpoint.errors import CheckpointError
from gptq_api.model.keys import Keys

_MISTRAL_WINDOW = 4096
"""what a Mistral config without the key means; null means none"""


@dataclass(frozen=True)
class Family:
    model_type: str
    title: str
    """for people"""
    qk_norm: bool = False
    """RMSNorm over every head of q and k, before the rotation"""
    qkv_bias: bool = False
    """q, k and v have a bias whatever the config says"""
    head_dim: int | None = None
    """where config.json does not give it; None: hidden_size / num_attention_heads"""
    fused: bool = False
    """q, k and v are stored as one Linear, and so are gate and up"""
    mixture: bool = False
    """of experts; what the config of another family says of them is nothing"""
    missing: str | None = None
    """what our forward pass lacks for it; None: nothing"""


_LLAMA = Family("llama", "LLaMA")
_FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "LLaMAForCausalLM": _LLAMA,
    "InternLMForCausalLM": Family("internlm", "InternLM"),
    "MistralForCausalLM": Family("mistral", "Mistral"),
    "MixtralForCausalLM": Family(
        "mixtral",
        "Mixtral",
        mixture=True,
        missing="there is no router that sends each token to two of its experts, and no Linear that holds the experts",
    ),
    "Phi3ForCausalLM": Family("phi3", "Phi-3", fused=True),
    "Qwen2ForCausalLM": Family("qwen2", "Qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": Family("qwen3", "Qwen3", qk_norm=True, head_dim=128),
}
_SERVED = "LLaMA, Mistral, Phi-3, Qwen2, Qwen3 and InternLM are"


def read_family(raw: dict[str, Any], source: str) -> Family:
    """By `architectures`, or by `model_type` where that is absent. CheckpointError for every other architecture."""
    named = raw.get("architectures")
    if isinstance(named, list) and named:
        for name in named:
            if isinstance(name, str) and name in _FAMILIES:
                return _FAMILIES[name]
        raise CheckpointError(f"{source}: architecture {named[0]!r} is not served; {_SERVED}")
    model_type = raw.get("model_type", "llama")
    for family in _FAMILIES.values():
        if family.model_type == model_type:
            return family
    raise CheckpointError(f"{source}: model_type {model_type!r} is not served; {_SERVED}")


def layer_windows(family: Family, raw: dict[str, Any], source: str, num_layers: int) -> tuple[int | None, ...]:
    """How many tokens, its own included, a token sees in each layer; None: all before it.

    Mistral and Phi-3: `sliding_window` in every layer. Qwen: only with `use_sliding_window`, in the layers that
    `layer_types` names or else from `max_window_layers` on. LLaMA has none, whatever the file says.
    """
    keys = Keys(raw, source)
    if family.model_type == "mistral":
        if "sliding_window" in raw and raw["sliding_window"] is None:
            return (None,) * num_layers
        return (keys.integer("sliding_window", 1, 2**31, default=_MISTRAL_WINDOW),) * num_layers
    if family.model_type == "phi3":
        window = None if raw.get("sliding_window") is None else keys.integer("sliding_window", 1, 2**31)
        return (window,) * num_layers
    if family.model_type not in ("qwen2", "qwen3") or not keys.flag("use_sliding_window", False):
        return (None,) * num_layers
    if raw.get("sliding_window") is None:
        return (None,) * num_layers
    window = keys.integer("sliding_window", 1, 2**31)
    kinds = raw.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) < num_layers:
            raise CheckpointError(f"{source}: layer_types does not name {num_layers} layers")
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise CheckpointError(f"{source}: layer_types names {kind!r}, which is not served")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds[:num_layers])
    first = keys.integer("max_window_layers", 0, 2**20, default=28)
    return tuple(window if index >= first else None for index in range(num_layers))
