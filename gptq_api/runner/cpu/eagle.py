"""The forward pass of an EAGLE-3 head on the CPU, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gptq_api.model.eagle import EagleWeights
from gptq_api.model.layers.activation import silu_and_multiply
from gptq_api.runner.cpu.attention import KVCache, Span, plan_attention
from gptq_api.runner.cpu.forward import PlainLlama
from gptq_api.runner.features import NO_ROW, Features


class PlainEagle(PlainLlama):
    """A loaded head that computes steps. Row i is computed with token i + 1 and the feature of token i, whose slot its
    keys and values have."""

    ahead = 1

    def __init__(self, head: EagleWeights, cache: KVCache, features: Features) -> None:
        super().__init__(head.llama, cache)
        self._head, self._store, self.num_bytes = head, features, head.num_bytes
        self._next_places: dict[int, int] = {}
        """by the last row of each sequence in the last step: where the feature of the token behind it stands"""

    def forward(self, token_ids: list[list[int]], spans: list[Span]) -> tuple[Tensor, list[int]]:
        """`token_ids`: of each row the token behind it. Returns (what `logits` takes, where in it the first row of each
        sequence stands)."""
        head, layer = self._head, self.weights.layers[0]
        plan = plan_attention(spans, self.cache, self._queries_per_kv)
        ids: list[int] = []
        first_rows = [0] * len(spans)
        self._next_places.clear()
        for i in plan.order:
            first_rows[i] = len(ids)
            ids += token_ids[i]
            self._next_places[len(ids) - 1] = self._place_behind(spans[i])
        embedded = functional.embedding(torch.tensor(ids), self.embedding).to(torch.float32)
        x = self._store.data.index_select(0, plan.slots + 1).to(torch.float32)
        normed = head.feature_norm.forward(x)
        qkv = layer.qkv.forward(torch.cat((layer.input_norm.forward(embedded), normed), -1))
        if head.config.norm_before_residual:
            x = normed
        cos, sin = self.weights.rotary.tables(plan.positions)
        x += layer.o.forward(self._attention[0].forward(qkv, cos, sin, 0, self.cache, plan))
        gate_up = layer.gate_up.forward(layer.post_attention_norm.forward(x)).to(x.dtype)
        x += layer.down.forward(silu_and_multiply(gate_up))
        return x, first_rows

    def logits(self, x: Tensor, rows: list[int]) -> Tensor:
        """float32 [len(rows), V] of these rows of what `forward` gave; tokens that the head has no row for are as
        unlikely as can be. What is sampled from them goes on from their outputs."""
        places = torch.tensor([self._next_places.get(row, 0) for row in rows])
        self._store.data.index_copy_(0, places, x[rows].to(self._store.dtype))
        logits = super().logits(x, rows)
        if self._head.target_ids is None:
            return logits
        spread = torch.full((len(rows), self.config.vocab_size), NO_ROW)
        return spread.index_copy_(1, self._head.target_ids, logits)

    def _place_behind(self, span: Span) -> int:
        """0 where its blocks end."""
        block, offset = divmod(span.num_computed + span.num_tokens, self.cache.block_size)
        return span.block_table[block] * self.cache.block_size + offset + 1 if block < len(span.block_table) else 0
