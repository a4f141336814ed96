"""LLaMA (arXiv:2302.13971, 2307.09288, 2407.21783) on a packed batch: no padding, no notion of requests.

On the CPU the stream between the layers is float32 whatever the type of the products: float32 arithmetic is as fast
there, and only the inputs and outputs of the quantized products are rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gptq_api.layers.activation import silu_and_multiply
from gptq_api.layers.attention import Attention, KVCache, Plan
from gptq_api.layers.linear import DenseLinear, Linear
from gptq_api.layers.norm import RMSNorm
from gptq_api.layers.rotary import Rotary
from gptq_api.model.config import LlamaConfig


@dataclass(frozen=True)
class LlamaLayer:
    """One block; `qkv` gives q, k and v side by side, `gate_up` gate and up."""

    input_norm: RMSNorm
    qkv: Linear
    attention: Attention
    o: Linear
    post_attention_norm: RMSNorm
    gate_up: Linear
    down: Linear

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, index: int, cache: KVCache, plan: Plan) -> Tensor:
        """x [M, H], updated in place."""
        attended = self.attention.forward(self.qkv.forward(self.input_norm.forward(x)), cos, sin, index, cache, plan)
        x += self.o.forward(attended)
        gate_up = self.gate_up.forward(self.post_attention_norm.forward(x)).to(x.dtype)
        x += self.down.forward(silu_and_multiply(gate_up))
        return x


@dataclass(frozen=True)
class Llama:
    config: LlamaConfig
    embedding: Tensor
    """[V, H], the checkpoint's type"""
    layers: list[LlamaLayer]
    norm: RMSNorm
    lm_head: Linear
    rotary: Rotary
    windows: tuple[int | None, ...]
    """what `plan_attention` must lay out masks for"""
    stream_dtype: torch.dtype

    def forward(self, token_ids: Tensor, cache: KVCache, plan: Plan, rows: Tensor | None) -> Tensor:
        """Token ids int64 [M] in the plan's order -> float32 logits [len(rows), V] of those rows; None: of none.

        K and V of all M tokens are in the cache afterwards.
        """
        x = functional.embedding(token_ids, self.embedding).to(self.stream_dtype)
        cos, sin = self.rotary.tables(plan.positions)
        for index, layer in enumerate(self.layers):
            x = layer.forward(x, cos, sin, index, cache, plan)
        if rows is None:
            return torch.empty(0, self.config.vocab_size)
        return self.lm_head.forward(self.norm.forward(x.index_select(0, rows))).to(torch.float32)

    @property
    def num_bytes(self) -> int:
        """Memory of the weights; a tied head counts once."""
        linears = [linear for layer in self.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        total = sum(linear.num_bytes for linear in linears) + self.lm_head.num_bytes
        tied = isinstance(self.lm_head, DenseLinear) and self.lm_head.shares(self.embedding)
        return total + (0 if tied else self.embedding.numel() * self.embedding.element_size())
