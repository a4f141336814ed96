"""The forward pass in plain torch, on a packed batch: no padding, no notion of requests.

On the CPU the stream between the layers is float32 whatever the type of the products: float32 arithmetic is as fast
there, and only the inputs and outputs of the quantized products are rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gptq_api.model.layers.activation import silu_and_multiply
from gptq_api.model.weights import LayerWeights, LlamaWeights
from gptq_api.runner.cpu.attention import Attention, KVCache, Plan


class PlainLlama:
    """A loaded model that computes steps."""

    def __init__(self, weights: LlamaWeights) -> None:
        self.weights, self.config, self.embedding = weights, weights.config, weights.embedding
        self.num_bytes, self.windows = weights.num_bytes, weights.windows
        c = weights.config
        self.queries_per_kv = c.num_attention_heads // c.num_key_value_heads
        sizes = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        self._attention = [Attention(*sizes, layer.window, layer.head_norm) for layer in weights.layers]

    def forward(self, token_ids: Tensor, cache: KVCache, plan: Plan) -> Tensor:
        """Token ids int64 [M] in the plan's order -> float32 [M, H], what `logits` takes.

        K and V of all M tokens are in the cache afterwards.
        """
        weights = self.weights
        x = functional.embedding(token_ids, weights.embedding).to(torch.float32)
        cos, sin = weights.rotary.tables(plan.positions)
        for index, layer in enumerate(weights.layers):
            self._layer(layer, x, cos, sin, index, cache, plan)
        return x

    def logits(self, x: Tensor, rows: list[int]) -> Tensor:
        """float32 [len(rows), V] of these rows of what `forward` gave."""
        chosen = torch.tensor(rows, dtype=torch.int64).to(x.device)
        normed = self.weights.norm.forward(x.index_select(0, chosen))
        return self.weights.lm_head.forward(normed).to(torch.float32)

    def _layer(
        self, layer: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor, index: int, cache: KVCache, plan: Plan
    ) -> None:
        """x [M, H], updated in place."""
        qkv = layer.qkv.forward(layer.input_norm.forward(x))
        x += layer.o.forward(self._attention[index].forward(qkv, cos, sin, index, cache, plan))
        gate_up = layer.gate_up.forward(layer.post_attention_norm.forward(x)).to(x.dtype)
        x += layer.down.forward(silu_and_multiply(gate_up))
