"""Weights of 8 bits in the packed layout of 4: two planes of nibbles.

    q = 16 h + l, z = 16 zh + zl:  s (q - z) = 16 s (h - zh) + s (l - zl)

So such a weight is one of 4 bits with two rows for each output, with scales 16 s and s, and a kernel adds the sums of
both before it rounds. They stand in rows g and g + 8 of a strip, which one lane of a warp has. Exact wherever 16 s is a
number of float16. The output head, which checkpoints leave in 16 bits, can be rounded to such a weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gptq_api.kernels.layout import (
    CHUNK_K,
    STRIP_ROWS,
    PackedLinear,
    chunk_bytes,
    pack_stream,
    pair_order,
    sort_groups,
)
from gptq_api.kernels.pack import pack_on_device, refusal
from gptq_api.kernels.reference import unpack
from gptq_api.kernels.workspace import CAPTURE, workspace

MAX_SCALE = 65504 / 16
"""16 times as much is the largest number of float16"""
HEAD_GROUP = 128
_OUTPUTS = STRIP_ROWS // 2
"""of a strip"""
_BLOCK_WEIGHTS = 2**24
"""split at a time: some 250 MB on the way"""

Codes = tuple[Tensor, Tensor, Tensor]
"""of some outputs: uint8 [K, N], float16 scales [G, N], uint8 zero points [G, N]"""


def pack_bytes(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor | None,
    group_size: int,
    device: torch.device | str,
    *,
    out_order: Tensor | None = None,
) -> PackedLinear:
    """int32 qweight [K/4, N], float scales [G, N], uint8 zeros [G, N] (0..255, decoded), int g_idx [K] (None: k //
    group_size); out_order: int [N], output i of the result is output out_order[i] of the arguments.

    Runs on `device`, a block of outputs at a time. Raises ValueError on what the layout cannot hold.
    """
    device = torch.device(device)
    k, n = qweight.shape[0] * 4, qweight.shape[1]
    if (reason := refusal(8, k, n, group_size)) is not None:
        raise ValueError(reason)
    qweight, zeros = qweight.to(device), zeros.to(device=device, dtype=torch.uint8)
    halves = _checked(scales.to(device))
    order = torch.arange(n, device=device) if out_order is None else out_order.to(device)
    perm = None if g_idx is None else sort_groups(g_idx.to(device), group_size)

    def block(outputs: slice) -> Codes:
        at = order[outputs]
        return unpack(qweight[:, at], 8).to(torch.uint8), halves[:, at], zeros[:, at]

    return _pack(k, n, group_size, perm, device, block)


def pack_head(weight: Tensor, device: torch.device | str) -> PackedLinear:
    """weight [V, H] of any float type, H a multiple of 8: each 128 inputs of an output get a scale and a zero point of
    their own, and are rounded to the nearest of 256 values, of which 0 is one. In V / 8 strips, the last one filled up
    with zeros: `out_features` is a multiple of 8. The error of a logit is some 0.6 % of what logits are apart.

    Raises ValueError on numbers beyond float16.
    """
    device = torch.device(device)
    size, k = weight.shape
    if (reason := refusal(8, k, _OUTPUTS, HEAD_GROUP)) is not None:
        raise ValueError(reason)

    def block(outputs: slice) -> Codes:
        return _rounded(weight[outputs].to(device), outputs.stop - outputs.start)

    return _pack(k, -(-size // _OUTPUTS) * _OUTPUTS, HEAD_GROUP, None, device, block)


def head_bytes(size: int, width: int) -> int:
    """Of what `pack_head` makes of a weight [V, H]."""
    return -(-size // _OUTPUTS) * -(-width // CHUNK_K) * chunk_bytes(HEAD_GROUP, has_zeros=True)


def _rounded(weight: Tensor, count: int) -> Codes:
    """[N, K] to the nearest, as `count` outputs, of which those beyond N are zeros."""
    n, k = weight.shape
    groups = -(-k // HEAD_GROUP)
    padded = torch.zeros(count, groups * HEAD_GROUP, device=weight.device)
    padded[:n, :k] = weight
    x = padded.view(count, groups, HEAD_GROUP)
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    halves = _checked(((high - low) / 255).clamp(min=2.0**-24))
    scales = halves.float()
    zeros = (-low / scales).round().clamp(0, 255)
    codes = x.div_(scales.unsqueeze(-1)).add_(zeros.unsqueeze(-1)).round_().clamp_(0, 255)
    codes = codes.to(torch.uint8).view(count, -1)[:, :k].t().contiguous()
    return codes, halves.t().contiguous(), zeros.to(torch.uint8).t().contiguous()


def _checked(scales: Tensor) -> Tensor:
    """In float16."""
    largest = float(scales.abs().max())
    if not largest <= MAX_SCALE:
        raise ValueError(f"a scale of {largest:g}; weights of 8 bits take scales up to {MAX_SCALE:g}")
    return scales.to(torch.float16)


def _pack(
    k: int, n: int, group_size: int, perm: Tensor | None, device: torch.device, block: Callable[[slice], Codes]
) -> PackedLinear:
    """`block`: the codes of some of the N outputs."""
    on_device = device.type == "cuda"
    chunks, at_once = -(-k // CHUNK_K), max(1, _BLOCK_WEIGHTS // k // _OUTPUTS) * _OUTPUTS
    shape = (n // _OUTPUTS, chunks, chunk_bytes(group_size, has_zeros=True))
    data = torch.empty(shape, dtype=torch.uint8, device=device)
    for first in range(0, n, at_once):
        outputs = slice(first, min(n, first + at_once))
        codes, scales, zeros = block(outputs)
        nibbles = torch.cat((codes >> 4, codes & 15), 1)
        scales, zeros = torch.cat((scales * 16, scales), 1), torch.cat((zeros >> 4, zeros & 15), 1)
        out = data[outputs.start // _OUTPUTS : outputs.stop // _OUTPUTS]
        if on_device:
            columns = pair_order(nibbles.shape[1])
            pack_on_device(_words(nibbles), scales, zeros, perm, group_size, columns, out)
            continue
        if perm is not None:
            nibbles = nibbles.index_select(0, perm)
        out.copy_(pack_stream(nibbles, scales, zeros, group_size, paired=True))
    if on_device:
        workspace(data.device.index, CAPTURE)
    return PackedLinear(data, k, n, group_size, True, perm, False, planes=True)


def _words(nibbles: Tensor) -> Tensor:
    """uint8 [K, N], values below 16 -> int32 [K/8, N], the first in the lowest bits."""
    words = nibbles[0::8].to(torch.int32)
    for i in range(1, 8):
        words |= nibbles[i::8].to(torch.int32) << 4 * i
    return words
