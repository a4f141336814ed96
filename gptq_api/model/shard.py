"""How ranks share a model: each has some of the outputs of every Linear, and all of its inputs.

No sum is cut, so an output can have the bits that it has on one device (docs/kernels.md says when), act-order or not:
that orders inputs alone, and gate and up are cut in the order in which down wants them. What a rank computes it gives
to all others before the next Linear reads it. q, k and v are cut into whole heads: each rank attends for its own, and
holds their part of the KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_api.checkpoint.checkpoint import GPTQTensors
from gptq_api.checkpoint.module import Outputs
from gptq_api.model.config import LlamaConfig
from gptq_api.model.modules import Module

UNIT = 16
"""outputs that stay together: a strip of the CUDA kernels, and whole 16-byte accesses"""


@dataclass(frozen=True)
class Shard:
    """What one rank of `size` has."""

    rank: int = 0
    size: int = 1

    @property
    def is_whole(self) -> bool:
        return self.size == 1

    def of(self, count: int, unit: int = UNIT) -> range:
        """Its part of `count` outputs: whole units, as even as they go."""
        units = -(-count // unit)
        begin, end = (min(count, unit * (units * rank // self.size)) for rank in (self.rank, self.rank + 1))
        return range(begin, end)

    def config(self, config: LlamaConfig) -> LlamaConfig:
        """With the heads of this rank; its other numbers are the whole model's."""
        if self.is_whole:
            return config
        return replace(
            config,
            num_attention_heads=config.num_attention_heads // self.size,
            num_key_value_heads=config.num_key_value_heads // self.size,
        )


WHOLE = Shard()


def refusal(config: LlamaConfig, size: int) -> str | None:
    """Why so many ranks cannot share a model; None where they can."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % size or kv_heads % size:
        fitting = [n for n in range(1, kv_heads + 1) if heads % n == 0 and kv_heads % n == 0]
        return (
            f"{heads} attention heads and {kv_heads} key-value heads do not divide by {size}; "
            f"{', '.join(map(str, fitting))} GPUs can share this model"
        )
    least = min(config.hidden_size, config.intermediate_size, config.vocab_size)
    if least < size * UNIT:
        return f"{least} outputs are less than {UNIT} for each of {size} ranks"
    return None


def outputs(config: LlamaConfig, module: Module, shard: Shard) -> Outputs:
    """Which outputs of a module a rank has. `config`: of the whole model."""
    if module.joins == "qkv":
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        sections = {"q": (heads,), "k": (kv_heads,), "v": (kv_heads,)}.get(_part(module), (heads, kv_heads, kv_heads))
        widths, unit = [count * config.head_dim for count in sections], config.head_dim
    else:
        stored_as_one = module.joins == "gate_up" and module.out_features == 2 * config.intermediate_size
        widths, unit = [config.intermediate_size] * 2 if stored_as_one else [module.out_features], UNIT
    starts = [sum(widths[:i]) for i in range(len(widths))]
    parts = [(start, shard.of(width, unit)) for start, width in zip(starts, widths, strict=True)]
    return tuple(range(start + part.start, start + part.stop) for start, part in parts)


def _part(module: Module) -> str:
    """ "q" of "self_attn.q_proj"."""
    return module.name.rpartition(".")[2].removesuffix("_proj")


Found = GPTQTensors | tuple[Tensor, Tensor | None]
"""a quantized Linear, or (weight [N, K], bias [N])"""


def cut(found: Found, chosen: Tensor) -> Found:
    """These outputs, int64, in that order."""
    if isinstance(found, GPTQTensors):
        return replace(
            found,
            qweight=_take(found.qweight, chosen, 1),
            zeros=_take(found.zeros, chosen, 1),
            scales=_take(found.scales, chosen, 1),
            bias=None if found.bias is None else _take(found.bias, chosen, 0),
        )
    weight, bias = found
    return _take(weight, chosen, 0), None if bias is None else _take(bias, chosen, 0)


def _take(tensor: Tensor, chosen: Tensor, dim: int) -> Tensor:
    return tensor.index_select(dim, chosen.to(tensor.device))


def cut_order(order: Tensor, shard: Shard, modules: Sequence[Module]) -> list[Tensor]:
    """The outputs of gate and up, stored as one module or two, in the order in which down has its inputs, `order`: int
    [intermediate size]."""
    part = shard.of(len(order))
    mine = order[part.start : part.stop].long()
    return [mine, mine] if len(modules) == 2 else [torch.cat((mine, mine + len(order)))]
