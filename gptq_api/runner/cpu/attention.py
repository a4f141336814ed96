"""Causal grouped-query attention over a paged KV cache, for a packed batch of sequences of any lengths.

Per step, `plan_attention` sorts the batch's rows into groups that one call can compute: all single-token rows of
similar context length together, each longer chunk by itself. Per layer and group: gather the context's blocks, one
scaled_dot_product_attention.

A row's result must not depend on the group it is computed in. Contexts are whole multiples of 16 tokens, masked
beyond their end, and query rows multiples of 4: with that torch's CPU attention gives the same bits for a row
whatever is beside it, however long the padding, and whether its chunk was one token or hundreds (measured; kept by a
test).
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gptq_api.model.layers.norm import HeadNorm
from gptq_api.model.layers.rotary import rotate

_CONTEXT_STEP = 16
_EXACT_CONTEXT_STEP = 512
_ROW_STEP = 4
_SMALLEST_BUCKET = 128


@dataclass(frozen=True)
class Span:
    """One sequence's share of a step: its `num_tokens` rows follow `num_computed` tokens that are in the cache
    already."""

    num_computed: int
    num_tokens: int
    block_table: list[int]


class KVCache:
    """K and V of every layer: [num_layers, num_blocks, block_size, 2, num_kv_heads, head_dim], zero until written.

    K and V of a token lie side by side, so that writing is one copy and reading a context one gather of its blocks.
    """

    def __init__(self, data: Tensor) -> None:
        """`data`: its memory. Zeros: masked slots are multiplied by zero, and what memory holds by chance may be
        NaN."""
        num_layers, num_blocks, block_size, _, num_kv_heads, head_dim = data.shape
        self._data = data
        self.by_slot = self._data.view(num_layers, num_blocks * block_size, -1).unbind(0)
        """per layer [num_slots, 2 * num_kv_heads * head_dim]"""
        self.by_block = self._data.view(num_layers, num_blocks, -1).unbind(0)
        """per layer [num_blocks, block_size * 2 * num_kv_heads * head_dim]"""
        self.num_blocks, self.block_size = num_blocks, block_size
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim

    @property
    def num_bytes(self) -> int:
        return self._data.numel() * self._data.element_size()

    @property
    def dtype(self) -> torch.dtype:
        return self._data.dtype

    def scrub(self, blocks: list[int]) -> None:
        """Replace what is not finite in these blocks by zeros, for their next owner."""
        scrub(self._data, blocks)


def scrub(data: Tensor, blocks: list[int]) -> None:
    """`data` [num_layers, num_blocks, ...], of which these blocks."""
    index = torch.tensor(blocks, dtype=torch.int64, device=data.device)
    data[:, index] = torch.nan_to_num(data[:, index], nan=0.0, posinf=0.0, neginf=0.0)


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros of the operating system's, on the CPU, which become resident when first written: torch.zeros writes all of
    them at once. MemoryError for more than the machine has, which some systems promise all the same."""
    size = math.prod(shape) * dtype.itemsize
    if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise MemoryError
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)


@dataclass(frozen=True)
class Group:
    """`num_sequences` sequences with `num_tokens` rows each, beginning at row `start`."""

    start: int
    num_sequences: int
    num_tokens: int
    blocks: Tensor
    """int64 [num_sequences * context / block_size]"""
    context: Tensor
    """where blocks are gathered to: [num_sequences * context / block_size, one block's elements], reused by every
    layer"""
    masks: dict[int | None, Tensor]
    """per window that some layer has (None: the whole context): 0 or -inf, [num_sequences, 1, query rows with padding,
    context]"""


@dataclass(frozen=True)
class Plan:
    """What every layer of a step needs to know of the batch. Rows are in the order of `order`: `order[i]` is the
    index of the i-th sequence in the spans; the single-token ones come first, by context length."""

    order: list[int]
    slots: Tensor
    """int64 [M]"""
    positions: Tensor
    """int64 [M]"""
    groups: list[Group]


def plan_attention(
    spans: list[Span], cache: KVCache, queries_per_kv: int, windows: Collection[int | None] = (None,)
) -> Plan:
    """Lay out a step for layers with these windows. Spans must not be empty; every context must fit its block table."""
    order = sorted(range(len(spans)), key=lambda i: (spans[i].num_tokens > 1, spans[i].num_computed))
    slots: list[int] = []
    positions: list[int] = []
    size = cache.block_size
    for i in order:
        span = spans[i]
        new = range(span.num_computed, span.num_computed + span.num_tokens)
        positions.extend(new)
        slots.extend(span.block_table[p // size] * size + p % size for p in new)
    device = cache.by_slot[0].device
    groups = []
    row = first = 0
    while first < len(order):
        last = _end_of_group(spans, order, first)
        members = [spans[i] for i in order[first:last]]
        groups.append(_group(row, members, cache, queries_per_kv, windows))
        row += len(members) * members[0].num_tokens
        first = last
    as_tensor = torch.tensor([slots, positions], dtype=torch.int64).to(device)
    return Plan(order, as_tensor[0], as_tensor[1], groups)


def _end_of_group(spans: list[Span], order: list[int], first: int) -> int:
    """Single-token rows share a group while their contexts share a power of two, so that padding at most doubles the
    work."""
    if spans[order[first]].num_tokens > 1:
        return first + 1
    limit = max(_SMALLEST_BUCKET, 1 << spans[order[first]].num_computed.bit_length())
    last = first + 1
    while last < len(order) and spans[order[last]].num_tokens == 1 and spans[order[last]].num_computed < limit:
        last += 1
    return last


def _group(
    start: int, members: list[Span], cache: KVCache, queries_per_kv: int, windows: Collection[int | None]
) -> Group:
    size = cache.block_size
    longest = max(span.num_computed + span.num_tokens for span in members)
    step = _context_step(longest, cache.dtype)
    num_blocks = -(-longest // math.lcm(step, size)) * math.lcm(step, size) // size
    table: list[int] = []
    for span in members:
        used = -(-(span.num_computed + span.num_tokens) // size)
        # Padding reads a sequence's own last block again: finite numbers that the mask takes out.
        table += span.block_table[:used] + [span.block_table[used - 1]] * (num_blocks - used)
    device = cache.by_block[0].device
    blocks = torch.tensor(table, dtype=torch.int64).to(device)
    num_tokens = members[0].num_tokens
    ends = torch.tensor([span.num_computed for span in members]).view(-1, 1, 1) + torch.arange(1, num_tokens + 1).view(
        1, -1, 1
    )
    rows = queries_per_kv * num_tokens
    padded = -(-rows // _ROW_STEP) * _ROW_STEP
    position = torch.arange(num_blocks * size)
    masks = {}
    for window in windows:
        visible = position < ends
        if window is not None:
            visible &= position >= ends - window
        mask = torch.zeros(visible.shape, dtype=cache.dtype).masked_fill_(~visible, -math.inf)
        # Query rows of one KV head: head by head, tokens inside; rows of padding see everything and are dropped.
        full = torch.zeros(len(members), 1, padded, num_blocks * size, dtype=cache.dtype)
        full[:, 0, :rows] = mask.repeat(1, queries_per_kv, 1)
        masks[window] = full.to(device)
    context = torch.empty(len(table), cache.by_block[0].shape[1], dtype=cache.dtype, device=device)
    return Group(start, len(members), num_tokens, blocks, context, masks)


def _context_step(longest: int, dtype: torch.dtype) -> int:
    """float32 products over more than 256 tokens are summed in an order that depends on their number."""
    return _EXACT_CONTEXT_STEP if dtype == torch.float32 and longest > 256 else _CONTEXT_STEP


class Attention:
    """The part of a layer between the q/k/v product and the output product."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None = None,
        qk_norm: HeadNorm | None = None,
    ) -> None:
        """`window`: a token sees so many tokens, its own included; None: all before it. It must be among those the
        step was planned for."""
        self._num_heads, self._num_kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        self.window, self.qk_norm = window, qk_norm

    def forward(self, qkv: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: KVCache, plan: Plan) -> Tensor:
        """qkv [M, (heads + 2 * kv heads) * head_dim], overwritten -> [M, heads * head_dim] of the cache's type.

        Writes K and V of all rows before any row reads: sequences of one batch may share blocks.
        """
        heads, kv_heads, dim = self._num_heads, self._num_kv_heads, self._head_dim
        qk = qkv[:, : (heads + kv_heads) * dim]
        by_head = qk.to(torch.float32).view(-1, heads + kv_heads, dim)
        if self.qk_norm is not None:
            by_head = self.qk_norm.forward(by_head)
        rotated = rotate(by_head, cos, sin)
        qk.copy_(rotated.view(qk.shape))
        qkv = qkv.to(cache.dtype)
        cache.by_slot[layer].index_copy_(0, plan.slots, qkv[:, heads * dim :])
        parts = [self._attend(qkv, group, layer, cache) for group in plan.groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend(self, qkv: Tensor, group: Group, layer: int, cache: KVCache) -> Tensor:
        heads, kv_heads, dim = self._num_heads, self._num_kv_heads, self._head_dim
        n, t, share = group.num_sequences, group.num_tokens, heads // kv_heads
        torch.index_select(cache.by_block[layer], 0, group.blocks, out=group.context)
        context = group.context.view(n, -1, 2, kv_heads, dim)
        q = qkv[group.start : group.start + n * t, : heads * dim].view(n, t, kv_heads, share, dim)
        q = q.permute(0, 2, 3, 1, 4).reshape(n, kv_heads, share * t, dim)
        mask = group.masks[self.window]
        q = functional.pad(q, (0, 0, 0, mask.shape[2] - share * t))
        out = functional.scaled_dot_product_attention(
            q, context[:, :, 0].transpose(1, 2), context[:, :, 1].transpose(1, 2), attn_mask=mask
        )
        out = out[:, :, : share * t].reshape(n, kv_heads, share, t, dim)
        return out.permute(0, 3, 1, 2, 4).reshape(n * t, heads * dim)
