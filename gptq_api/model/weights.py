"""A loaded LLaMA (arXiv:2302.13971, 2307.09288, 2407.21783): what a runner on any device computes with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gptq_api.model.config import LlamaConfig
from gptq_api.model.layers.linear import DenseLinear, Linear
from gptq_api.model.layers.norm import HeadNorm, RMSNorm
from gptq_api.model.layers.rotary import Rotary
from gptq_api.model.shard import WHOLE, Shard


@dataclass(frozen=True)
class LayerWeights:
    """One block; `qkv` gives q, k and v side by side, `gate_up` gate and up."""

    input_norm: RMSNorm
    qkv: Linear
    head_norm: HeadNorm | None
    """of q and k, before the rotation"""
    window: int | None
    """tokens that a token sees, its own included; None: all before it"""
    o: Linear
    post_attention_norm: RMSNorm
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class LlamaWeights:
    config: LlamaConfig
    """with the attention heads of this rank"""
    embedding: Tensor
    """[V, H]"""
    layers: list[LayerWeights]
    norm: RMSNorm
    lm_head: Linear
    rotary: Rotary
    shard: Shard = WHOLE
    """what is here of each Linear's outputs"""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Every window that some layer has, once."""
        return tuple(dict.fromkeys(layer.window for layer in self.layers))

    @property
    def num_bytes(self) -> int:
        """Memory of the weights; a tied head counts once."""
        linears = [linear for layer in self.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        total = sum(linear.num_bytes for linear in linears) + self.lm_head.num_bytes
        tied = isinstance(self.lm_head, DenseLinear) and self.lm_head.shares(self.embedding)
        return total + (0 if tied else self.embedding.numel() * self.embedding.element_size())
