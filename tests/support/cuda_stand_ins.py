"""The CUDA kernels of a step in plain torch, row by row, and a torch.cuda that does everything at once: the host's side
of runner/cuda/runner.py runs on a CPU with them, and only that is what they are for."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gptq_api.kernels import ops, sampling
from gptq_api.kernels.decode_attention import RotaryInputs
from gptq_api.kernels.exchange import Place
from gptq_api.kernels.sampling import SamplingInputs
from gptq_api.runner.cuda import forward, graphs, runner
from gptq_api.runner.ranks import Rank

TILE_ROWS = 8


def embed(history: Tensor, row_slot: Tensor, positions: Tensor, table: Tensor, out: Tensor) -> None:
    for row, (slot, position) in enumerate(zip(row_slot.tolist(), positions.tolist(), strict=True)):
        out[row] = 0 if position < 0 else table[int(history[slot, position])]


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, perm: Tensor | None = None) -> Tensor:
    y = _normed(x, torch.ones_like(weight), eps)
    return out.copy_((y if perm is None else y[:, perm.long()]) * weight.float())


def rope_and_write(
    qkv: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cos_sin: Tensor,
    kv_layer: Tensor,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    _, _, kv_heads, size, dim = kv_layer.shape
    for row, (position, slot) in enumerate(zip(positions.tolist(), slot_mapping.tolist(), strict=True)):
        if position < 0:
            continue
        heads = qkv[row].view(-1, dim)
        for norm, part in ((q_norm, heads[:num_heads]), (k_norm, heads[num_heads : num_heads + kv_heads])):
            if norm is not None:
                part.copy_(_normed(part, norm, eps))
        cos, sin = cos_sin[position].chunk(2)
        low, high = heads[: num_heads + kv_heads].clone().chunk(2, -1)
        heads[: num_heads + kv_heads] = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
        if slot >= 0:
            kv_layer[slot // size, 0, :, slot % size] = heads[num_heads : num_heads + kv_heads]
            kv_layer[slot // size, 1, :, slot % size] = heads[num_heads + kv_heads :]


def _attend(
    qkv: Tensor, kv: Tensor, table: Tensor, visible: int, row: int, out: Tensor, heads: int, scale: float, window: Any
) -> None:
    _, _, kv_heads, size, dim = kv.shape
    blocks = kv[table[: -(-visible // size)].long()].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, dim)
    first = 0 if window is None else max(0, visible - window)
    k, v = blocks[:, :, first:visible]
    q = qkv[row].view(-1, dim)[:heads].view(kv_heads, -1, dim)
    out[row] = ((q @ k.transpose(1, 2) * scale).softmax(-1) @ v).flatten()


def _check_groups(groups: Tensor, tables: Tensor, lens: Tensor, rotary: RotaryInputs | None) -> None:
    """Each entry with a context is in one group, of consecutive tokens of one sequence."""
    real, next_free = int((lens > 0).sum()), 0
    for i, (rows, new) in enumerate(groups.tolist()):
        if rows:
            assert i == next_free and rows <= new
            same = slice(i, i + rows)
            assert lens[same].tolist() == list(range(int(lens[i]), int(lens[i]) + rows))
            assert bool((tables[same] == tables[i]).all())
            if rotary is not None:
                assert rotary.positions[i - (new - rows)] == lens[i] - 1 - (new - rows)
            next_free += rows
    assert next_free == real


def decode_attention(
    qkv: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    out: Tensor,
    num_heads: int,
    scale: float,
    workspace: Tensor,
    window: int | None = None,
    rotary: RotaryInputs | None = None,
    out_index: Tensor | None = None,
    *,
    groups: Tensor | None = None,
    prefetch: bool = False,
) -> None:
    assert prefetch == (rotary is not None)
    if groups is not None:
        _check_groups(groups, block_tables, context_lens, rotary)
    assert out_index is None  # only packed CUDA weights have an order
    if rotary is not None:
        r = rotary
        rope_and_write(qkv, r.positions, r.slot_mapping, r.cos_sin, kv_layer, num_heads, r.q_norm, r.k_norm, r.eps)
    starts = query_start.tolist()
    for i, visible in enumerate(context_lens.tolist()):
        if visible and starts[i + 1] - starts[i] == 1:
            _attend(qkv, kv_layer, block_tables[i], visible, starts[i], out, num_heads, scale, window)


def prefill_attention(
    qkv: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    tiles: Tensor,
    out: Tensor,
    num_heads: int,
    scale: float,
    window: int | None = None,
) -> None:
    starts, lens = query_start.tolist(), context_lens.tolist()
    for i, first in tiles.tolist():
        if i < 0:
            continue
        rows = starts[i + 1] - starts[i]
        assert rows and first % TILE_ROWS == 0
        for row in range(first, min(rows, first + TILE_ROWS)):
            visible = lens[i] - rows + row + 1
            _attend(qkv, kv_layer, block_tables[i], visible, starts[i] + row, out, num_heads, scale, window)


def sample(logits: Tensor, inputs: SamplingInputs, history: Tensor, out_tokens: Tensor) -> None:
    """Greedy."""
    for row, (slot, length) in enumerate(inputs.packed[:2].t().tolist()):
        finite = bool(logits[row].isfinite().all())
        out_tokens[row] = int(logits[row].argmax()) if slot >= 0 and finite else -1
        if slot >= 0:
            history[slot, length] = max(int(out_tokens[row]), 0)


def adjust(
    logits: Tensor,
    inputs: SamplingInputs,
    history: Tensor,
    entries: Tensor | None,
    out: Tensor | None = None,
    masks: Tensor | None = None,
) -> None:
    """Masks alone."""
    num, size = logits.shape
    assert masks is not None and entries is not None and entries.tolist() == [0] * (num + 1)
    words = masks[num:].view(-1, sampling.mask_words(size)).numpy()
    for row, which in enumerate(masks[:num].tolist()):
        if which >= 0:
            allowed = np.unpackbits(words[which].view(np.uint8), count=size, bitorder="little")
            logits[row].masked_fill_(torch.from_numpy(allowed == 0), -1e30)


def logprobs(logits: Tensor, inputs: SamplingInputs, tokens: Tensor, out: Tensor) -> None:
    for row, num_top in enumerate(inputs.packed[6].tolist()):
        if num_top < 0 or int(inputs.packed[0, row]) < 0:
            continue
        if int(tokens[row]) < 0:
            out[row, 0, 0] = -1
            continue
        table = logits[row].log_softmax(-1)
        values, ids = table.topk(num_top)
        out[row, 0, : 1 + num_top] = torch.cat((tokens[row : row + 1], ids.to(torch.int32)))
        out[row, 1, : 1 + num_top] = torch.cat((table[tokens[row : row + 1].long()], values)).view(torch.int32)


class _Nothing:
    """An event, a stream."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class HostExchange:
    """What ranks that are threads of the CPU give each other, as `Exchange` does on GPUs. Nothing of a place but a
    rank's own columns is right before an exchange has brought it."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.size, self._each = rank.shard.rank, rank.shard.size, rank.each

    def place(self, matrix: Tensor, columns: list[range]) -> Place:
        return Place(matrix, [], columns)

    def takes_index(self, place: Place, rows: int) -> bool:
        return rows <= 8

    def all_gather(self, place: Place, part: Tensor, index: Tensor | None = None) -> Tensor:
        rows = place.own[: len(part)]
        whole = torch.cat(self._each(part.clone()), -1)
        rows.copy_(whole) if index is None else rows.index_copy_(1, index.long(), whole)
        return rows

    def all_gather_norm(
        self, place: Place, rows: int, weight: Tensor, eps: float, out: Tensor, perm: Tensor | None = None
    ) -> Tensor:
        columns = place.columns[self.rank]
        x = self.all_gather(place, place.own[:rows, columns.start : columns.stop])
        return rms_norm(x, weight, eps, out, perm)

    def who_is_missing(self) -> None: ...


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of the test."""
    zeros = torch.zeros
    for module, name, value in (
        (ops, "embed", embed),
        (ops, "rms_norm", rms_norm),
        (ops, "rope_and_write", rope_and_write),
        (forward, "decode_attention", decode_attention),
        (forward, "decode_attention_workspace", lambda *_: None),
        (forward, "prefill_attention", prefill_attention),
        (runner, "TILE_ROWS", TILE_ROWS),
        (sampling, "sample", sample),
        (sampling, "logprobs", logprobs),
        (sampling, "adjust", adjust),
        (graphs.Graphs, "run", lambda found, shape, capture=True: found._body(shape)),
        (torch.cuda, "Event", _Nothing),
        (torch.cuda, "Stream", _Nothing),
        (torch.cuda, "stream", lambda _: contextlib.nullcontext()),
        (torch.cuda, "graph_pool_handle", lambda: None),
        (torch, "zeros", lambda *shape, pin_memory=False, **kind: zeros(*shape, **kind)),
        (torch.Tensor, "pin_memory", lambda tensor: tensor),
        (torch, "mm", lambda x, w, out_dtype, out: torch.matmul(x, w, out=out)),
    ):
        monkeypatch.setattr(module, name, value)
