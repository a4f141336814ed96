"""The one table of a model's Linears: what they are called in checkpoints, their sizes, who reads the same input, what
is merged into one weight, and how ranks would share them. Loader, plan, `inspect`, quantize and synthetic checkpoints
read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from gptq_api.checkpoint.checkpoint import Checkpoint
from gptq_api.model.config import LlamaConfig, read_config

Joint = Literal["qkv", "o", "gate_up", "down", "experts", "router"]


@dataclass(frozen=True)
class Module:
    """One Linear of a layer as a checkpoint stores it."""

    name: str
    """within the layer, such as "self_attn.q_proj" """
    in_features: int
    out_features: int
    joins: Joint
    """the Linear of the forward pass that it is a part of; parts stand side by side, in the table's order. Parts of one
    joint read the same input."""
    has_bias: bool = False
    """it must have one; otherwise it may"""

    @property
    def split(self) -> Literal["columns", "rows"]:
        """How ranks share it: by outputs, or by inputs where those are what a split Linear before it puts out."""
        return "rows" if self.joins in ("o", "down") else "columns"

    @property
    def ends_in_stream(self) -> bool:
        """Whether its outputs are added to the residual stream."""
        return self.joins in ("o", "down")


def modules(config: LlamaConfig) -> tuple[Module, ...]:
    """Of one layer, in the order of the forward pass."""
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden, ffn = config.hidden_size, config.intermediate_size
    qkv_bias, mlp_bias = config.attention_bias, config.mlp_bias
    if "qkv" in config.fused:
        attention: tuple[Module, ...] = (Module("self_attn.qkv_proj", hidden, heads + 2 * kv, "qkv", qkv_bias),)
    else:
        sizes = (("q", heads), ("k", kv), ("v", kv))
        attention = tuple(Module(f"self_attn.{part}_proj", hidden, n, "qkv", qkv_bias) for part, n in sizes)
    attention += (Module("self_attn.o_proj", heads, hidden, "o"),)
    if config.num_experts:
        experts = [
            module
            for i in range(config.num_experts)
            for module in (
                Module(f"block_sparse_moe.experts.{i}.w1", hidden, ffn, "experts"),
                Module(f"block_sparse_moe.experts.{i}.w3", hidden, ffn, "experts"),
                Module(f"block_sparse_moe.experts.{i}.w2", ffn, hidden, "experts"),
            )
        ]
        return (*attention, Module("block_sparse_moe.gate", hidden, config.num_experts, "router"), *experts)
    if "gate_up" in config.fused:
        gate_up: tuple[Module, ...] = (Module("mlp.gate_up_proj", hidden, 2 * ffn, "gate_up", mlp_bias),)
    else:
        gate_up = tuple(Module(f"mlp.{part}_proj", hidden, ffn, "gate_up", mlp_bias) for part in ("gate", "up"))
    return (*attention, *gate_up, Module("mlp.down_proj", ffn, hidden, "down", mlp_bias))


_FUSED = {"qkv": ("self_attn.qkv_proj", "self_attn.q_proj"), "gate_up": ("mlp.gate_up_proj", "mlp.gate_proj")}


def as_stored(config: LlamaConfig, names: frozenset[str]) -> LlamaConfig:
    """The config for a file with these tensors: some programs store q, k and v (and gate and up) side by side in the
    order of the forward pass, whatever the family does."""

    def has(module: str) -> bool:
        return any(f"{layer_prefix(0)}{module}.{part}" in names for part in ("qweight", "weight"))

    fused = {joint for joint, (one, first) in _FUSED.items() if has(one) and not has(first)}
    return replace(config, fused=config.fused | fused)


def config_of(checkpoint: Checkpoint) -> LlamaConfig:
    """What config.json says of a checkpoint's model, with its Linears as they are stored. CheckpointError as
    `read_config`."""
    return as_stored(read_config(checkpoint.folder), checkpoint.store.names)


def parts(config: LlamaConfig, joint: Joint) -> list[Module]:
    """The modules that are one Linear of the forward pass."""
    return [module for module in modules(config) if module.joins == joint]


def layer_prefix(index: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"model.layers.{index}."


def all_modules(config: LlamaConfig) -> Iterator[tuple[str, Module]]:
    """(name in the checkpoint, module) of every Linear in the layers."""
    table = modules(config)
    for index in range(config.num_hidden_layers):
        for module in table:
            yield layer_prefix(index) + module.name, module


def norm_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The weights of every norm by their names."""
    wide: tuple[int, ...] = (config.hidden_size,)
    each = {"input_layernorm": wide, "post_attention_layernorm": wide}
    if config.family.qk_norm:
        each |= {"self_attn.q_norm": (config.head_dim,), "self_attn.k_norm": (config.head_dim,)}
    shapes = {
        f"{layer_prefix(index)}{name}.weight": shape
        for index in range(config.num_hidden_layers)
        for name, shape in each.items()
    }
    return shapes | {"model.norm.weight": wide}
