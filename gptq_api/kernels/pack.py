"""A checkpoint's tensors of 4 bits become the packed layout, once at load; those of 8: planes.py. Knows nothing about
checkpoints or models."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_api.kernels.extension import cuda as _cuda
from gptq_api.kernels.layout import (
    CHUNK_K,
    STRIP_ROWS,
    PackedLinear,
    chunk_bytes,
    groups_per_chunk,
    pack_stream,
    pair_order,
    sort_groups,
)
from gptq_api.kernels.reference import unpack
from gptq_api.kernels.workspace import CAPTURE, workspace


def refusal(bits: int, in_features: int, out_features: int, group_size: int) -> str | None:
    """Why these kernels do not take such a weight; None where they do. From numbers alone."""
    if bits not in (4, 8):
        return f"{bits} bits; the CUDA kernels hold 4 and 8"
    multiple = STRIP_ROWS if bits == 4 else STRIP_ROWS // 2
    if out_features % multiple:
        return f"{out_features} output features; the CUDA kernels need a multiple of {multiple}"
    if in_features % 8 or in_features > 65536:
        return f"{in_features} input features; the CUDA kernels need a multiple of 8, at most 65536"
    if group_size not in (-1, 32, 64) and (group_size <= 0 or group_size % 128):
        return f"group size {group_size}; the CUDA kernels hold 32, 64, multiples of 128, and -1"
    return None


def pack(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    g_idx: Tensor | None,
    group_size: int,
    device: torch.device | str,
    *,
    paired: bool = False,
    out_order: Tensor | None = None,
) -> PackedLinear:
    """int32 qweight [K/8, N], float scales [G, N], uint8 zeros [G, N] (0..16, decoded; None: all 8), int g_idx [K]
    (None: k // group_size).

    Runs on `device`; on CUDA one kernel that needs no memory beside its result. Zero points that are all 8 are
    dropped. `paired`: the first N/2 outputs are gates, the last N/2 ups. `out_order`: int [N], output i of the result
    is output out_order[i] of the arguments. Raises ValueError on what the layout cannot hold.
    """
    device = torch.device(device)
    k, n = qweight.shape[0] * 8, qweight.shape[1]
    if (reason := refusal(4, k, n, group_size)) is not None:
        raise ValueError(reason)
    halves = scales.to(device=device, dtype=torch.float16)
    if not bool(torch.isfinite(halves).all()):
        raise ValueError("a scale is not finite in float16")
    offsets = None if zeros is None else zeros.to(device=device, dtype=torch.uint8)
    if offsets is not None and bool((offsets == 8).all()):
        offsets = None
    perm = None if g_idx is None else sort_groups(g_idx.to(device), group_size)
    if device.type == "cuda":
        data = pack_on_device(qweight.to(device), halves, offsets, perm, group_size, columns_of(n, paired, out_order))
        workspace(data.device.index, CAPTURE)
    else:
        weight = unpack(qweight, 4).to(torch.uint8)
        if perm is not None:
            weight = weight.index_select(0, perm)
        if out_order is not None:
            weight, halves = weight[:, out_order], halves[:, out_order]
            offsets = None if offsets is None else offsets[:, out_order]
        data = pack_stream(weight, halves, offsets, group_size, paired=paired)
    return PackedLinear(data, k, n, group_size, offsets is not None, perm, paired)


def columns_of(n: int, paired: bool, out_order: Tensor | None) -> Tensor | None:
    """Which output each row of the strips is: int [N]; None: in order."""
    if not paired:
        return out_order
    order = pair_order(n)
    return order if out_order is None else out_order[order.to(out_order.device)]


def pack_on_device(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    group_size: int,
    columns: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """What `pack_stream` gives, by one kernel; into `out` where given."""
    k, n = qweight.shape[0] * 8, qweight.shape[1]
    size = k if group_size == -1 else group_size
    expected = (-(-k // size), n)
    if tuple(scales.shape) != expected or (zeros is not None and tuple(zeros.shape) != expected):
        raise ValueError(f"scales {tuple(scales.shape)}: K={k}, N={n} in groups of {group_size} need {expected}")
    if columns is not None:
        columns = columns.to(device=qweight.device, dtype=torch.int32).contiguous()
    qweight, scales = qweight.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    chunks = -(-k // CHUNK_K)
    shape = (n // STRIP_ROWS, chunks, chunk_bytes(group_size, zeros is not None))
    data = torch.empty(shape, dtype=torch.uint8, device=qweight.device) if out is None else out
    assert data.is_contiguous() and tuple(data.shape) == shape
    sources = [0 if t is None else t.data_ptr() for t in (qweight, scales, zeros, perm, columns)]
    stream = torch.cuda.current_stream(data.device).cuda_stream
    step = chunks * CHUNK_K if group_size == -1 else group_size
    with torch.cuda.device(data.device):
        _cuda.pack(*sources, data.data_ptr(), n, k, groups_per_chunk(group_size), step, scales.shape[0], stream)
    return data
