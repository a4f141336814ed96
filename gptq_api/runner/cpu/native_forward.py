"""The forward pass on the CPU in one call of `ext/cpu`: for models whose Linears are all ours to compute.

Everything between two products is float32. A row's bits depend on its own tokens alone: sums have one order for any
number of rows and threads, attention adds up 64 keys after the other from the beginning of the context, and keys that a
row does not see add zeros.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gptq_api.model.layers.linear import Linear, PlainLinear, SplitLinear
from gptq_api.model.weights import LayerWeights, LlamaWeights
from gptq_api.runner.cpu import native
from gptq_api.runner.cpu.attention import Span, scrub
from gptq_api.runner.features import Features

_LANES = 16
"""numbers that are computed together: head sizes and cache blocks are whole multiples of it"""


def takes(weights: LlamaWeights, block_size: int) -> bool:
    """Whether every Linear between embedding and head is quantized, and heads and blocks fit the kernels."""
    fits = block_size % _LANES == 0 and weights.config.head_dim % _LANES == 0
    return fits and computes_all(weights)


def computes_all(weights: LlamaWeights) -> bool:
    """Whether every Linear between embedding and head is a product of ours."""
    linears = [linear for layer in weights.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return all(_parts(linear) for linear in linears)


class BlockCache:
    """K and V of every layer, [num_layers, num_blocks, kv heads, 2, head_dim * block_size]: within a block K stands by
    dimension and V by token."""

    def __init__(self, data: Tensor, block_size: int) -> None:
        """`data`: its memory, zeros."""
        self.data, self.block_size, self.num_blocks = data, block_size, data.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def scrub(self, blocks: list[int]) -> None:
        """Replace what is not finite in these blocks by zeros, for their next owner."""
        scrub(self.data, blocks)


class NativeLlama:
    """A loaded model that computes steps."""

    ahead = 0

    def __init__(self, weights: LlamaWeights, cache: BlockCache, features: Features | None = None) -> None:
        """`features`: to be written for every token."""
        self._features = features
        self.weights, self.cache, self.config, self.embedding = weights, cache, weights.config, weights.embedding
        self.num_bytes, c = weights.num_bytes, weights.config
        rotary = weights.rotary
        self._engine = native.engine()
        self._model = native.module().Model(
            self._engine,
            hidden=c.hidden_size,
            ffn=c.intermediate_size,
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            dim=c.head_dim,
            vocab=c.vocab_size,
            eps=c.rms_norm_eps,
            embedding=self.embedding.data_ptr(),
            embedding_kind=native.KINDS[self.embedding.dtype],
            frequencies=rotary.frequencies.data_ptr(),
            rotary_scale=rotary.scale,
        )
        self._model.set_cache(cache.data.data_ptr(), native.KINDS[cache.data.dtype], cache.num_blocks, cache.block_size)
        for layer in weights.layers:
            self._add(layer)
        if features is not None:
            self._model.set_taps(list(features.taps))

    def _add(self, layer: LayerWeights) -> None:
        norm = layer.head_norm
        self._model.add_layer(
            input_norm=layer.input_norm.weight.data_ptr(),
            post_attention_norm=layer.post_attention_norm.weight.data_ptr(),
            q_norm=0 if norm is None else norm.weight[0].data_ptr(),
            k_norm=0 if norm is None else norm.weight[-1].data_ptr(),
            window=layer.window or 0,
            qkv=_parts(layer.qkv),
            o=_parts(layer.o),
            gate_up=_parts(layer.gate_up),
            down=_parts(layer.down),
        )

    def forward(self, token_ids: list[list[int]], spans: list[Span]) -> tuple[Tensor, list[int]]:
        """The new tokens of each sequence -> (what `logits` takes, where in it the first row of each stands).

        K and V of all of them are in the cache afterwards.
        """
        counts = [span.num_tokens for span in spans]
        starts = [0, *accumulate(counts)]
        x = torch.empty(starts.pop(), self.config.hidden_size)
        step = (
            [token for ids in token_ids for token in ids],
            [span.num_computed for span in spans],
            counts,
            [span.block_table for span in spans],
            x.data_ptr(),
        )
        if self._features is None:
            self._model.forward(*step)
            return x, starts
        tapped = torch.empty(len(x), len(self._features.taps) * self.config.hidden_size)
        self._model.forward(*step, tapped.data_ptr())
        size = self.cache.block_size
        slots = [
            span.block_table[position // size] * size + position % size
            for span in spans
            for position in range(span.num_computed, span.num_computed + span.num_tokens)
        ]
        self._features.put(tapped, torch.tensor(slots) + 1)
        return x, starts

    def logits(self, x: Tensor, rows: list[int]) -> Tensor:
        """float32 [len(rows), V] of these rows of what `forward` gave."""
        normed = torch.empty(len(rows), x.shape[1])
        self._model.finish(x.data_ptr(), rows, self.weights.norm.weight.data_ptr(), normed.data_ptr())
        return self.weights.lm_head.forward(normed).to(torch.float32)


def _parts(linear: Linear) -> list[tuple[Any, ...]]:
    """A Linear as ext/cpu takes it; none where it does not."""
    found = []
    for part in linear.parts if isinstance(linear, SplitLinear) else [linear]:
        if not isinstance(part, PlainLinear) or not isinstance(part.weight, native.QuantizedWeight):
            return []
        found.append((part.weight.fields(), 0 if part.bias is None else part.bias.data_ptr()))
    return found
