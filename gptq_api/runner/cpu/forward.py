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
from gptq_api.runner.cpu import native
from gptq_api.runner.cpu.attention import Attention, KVCache, Plan, Span, plan_attention
from gptq_api.runner.features import Features
from gptq_api.runner.ranks import Rank

_ROWS_FOR_THREADS = 64
"""Rows of a step from which on torch's own operations are worth several threads. With fewer they are short, and where
somebody else wants a core, each waits for it in turn: a step took 20 times as long beside five busy processes."""


class PlainLlama:
    """A loaded model that computes steps."""

    ahead = 0

    def __init__(
        self,
        weights: LlamaWeights,
        cache: KVCache,
        *,
        shares_threads: bool = False,
        features: Features | None = None,
        rank: Rank | None = None,
    ) -> None:
        """`shares_threads`: short operations had better leave the cores to our own kernels and to others. `features`:
        to be written for every token. `rank`: where the weights are those of one of several."""
        self._features, self._rank = features, rank
        self.weights, self.cache, self.config, self.embedding = weights, cache, weights.config, weights.embedding
        self.num_bytes, c = weights.num_bytes, weights.config
        self._queries_per_kv = c.num_attention_heads // c.num_key_value_heads
        self._shares_threads = shares_threads
        sizes = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        self._attention = [Attention(*sizes, layer.window, layer.head_norm) for layer in weights.layers]

    def forward(self, token_ids: list[list[int]], spans: list[Span]) -> tuple[Tensor, list[int]]:
        """The new tokens of each sequence -> (what `logits` takes, where in it the first row of each stands).

        K and V of all of them are in the cache afterwards.
        """
        weights = self.weights
        plan = plan_attention(spans, self.cache, self._queries_per_kv, weights.windows)
        ids: list[int] = []
        first_rows = [0] * len(spans)
        for i in plan.order:
            first_rows[i] = len(ids)
            ids += token_ids[i]
        if self._shares_threads:
            torch.set_num_threads(native.num_threads() if len(ids) >= _ROWS_FOR_THREADS else 1)
        x = functional.embedding(torch.tensor(ids).to(self.embedding.device), weights.embedding).to(torch.float32)
        cos, sin = weights.rotary.tables(plan.positions)
        taps, tapped = () if self._features is None else self._features.taps, list[Tensor]()
        for index, layer in enumerate(weights.layers):
            if index in taps:
                tapped.append(x.clone())
            self._layer(layer, x, cos, sin, index, plan)
        if self._features is not None:
            if len(weights.layers) in taps:
                tapped.append(x)
            self._features.put(torch.cat(tapped, -1), plan.slots + 1)
        return x, first_rows

    def logits(self, x: Tensor, rows: list[int]) -> Tensor:
        """float32 [len(rows), V] of these rows of what `forward` gave."""
        chosen = torch.tensor(rows, dtype=torch.int64).to(x.device)
        normed = self.weights.norm.forward(x.index_select(0, chosen))
        return self._whole(self.weights.lm_head.forward(normed)).to(torch.float32)

    def _whole(self, part: Tensor) -> Tensor:
        """[M, N of each rank] -> [M, N]"""
        return part if self._rank is None else self._rank.all_gather(part)

    def _layer(self, layer: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor, index: int, plan: Plan) -> None:
        """x [M, H], updated in place."""
        qkv = layer.qkv.forward(layer.input_norm.forward(x))
        attended = self._attention[index].forward(qkv, cos, sin, index, self.cache, plan)
        x += self._whole(layer.o.forward(self._whole(attended)))
        gate_up = layer.gate_up.forward(layer.post_attention_norm.forward(x)).to(x.dtype)
        x += self._whole(layer.down.forward(self._whole(silu_and_multiply(gate_up))))
