"""What tests and benchmarks ask of the kernels and the server never does.

`emulate` and `dequantize` read a packed weight back. Two arguments elsewhere are for measurements only as well:
`gemm(in_a_row=True)`, for GEMMs with nothing between them, and `decode_attention(teams=...)`, which forces one of the
two ways of sharing the work that give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_api.kernels import gemm
from gptq_api.kernels.layout import CHUNK_K, STRIP_ROWS, WEIGHT_BYTES, PackedLinear


def emulate(packed: PackedLinear) -> Tensor:
    """float64 [K, N]: the dequantized weight, read lane by lane as the A fragment of mma.m16n8k16. Slow and
    literal."""
    data = packed.data.cpu()
    strips, chunks, _ = data.shape
    groups = packed.groups_per_chunk
    words = data[..., :WEIGHT_BYTES].contiguous().view(torch.int32).view(strips, chunks, 2, 32, 4).to(torch.int64)
    meta = WEIGHT_BYTES + 32 * groups
    scales = data[..., WEIGHT_BYTES:meta].contiguous().view(torch.float16).view(strips, chunks, groups, 8, 2).double()
    zeros = (
        data[..., meta:].reshape(strips, chunks, groups, 8, 2).double()
        if packed.has_zeros
        else torch.full_like(scales, 8.0)
    )
    out = torch.zeros(chunks * CHUNK_K, strips * STRIP_ROWS, dtype=torch.float64)
    fragments = out.view(chunks, 2, 4, 16, strips, STRIP_ROWS)  # chunk, block, k16 step, k, strip, row
    for lane in range(32):
        g, t = divmod(lane, 4)
        for step in range(8):
            block, j = divmod(step, 4)
            group = step * 16 * groups // CHUNK_K
            for p in range(4):
                row_half, k = p % 2, 2 * t + 8 * (p // 2)
                for e in range(2):
                    value = (words[:, :, block, lane, j] >> (4 * p + 16 * e)) & 15
                    real = (value - zeros[:, :, group, g, row_half]) * scales[:, :, group, g, row_half]
                    fragments[:, block, j, k + e, :, g + 8 * row_half] = real.T
    out = out[: packed.in_features]
    if packed.paired:
        out = out.view(-1, strips, 2, 8).transpose(1, 2).reshape(packed.in_features, -1)
    if packed.planes:
        out = out.view(-1, strips, 2, 8).sum(2).reshape(packed.in_features, -1)
    if packed.perm is not None:
        unsorted = torch.empty_like(out)
        unsorted[packed.perm.cpu().long()] = out
        out = unsorted
    return out


def dequantize(weight: PackedLinear, dtype: torch.dtype) -> Tensor:
    """fp16 or bf16 [N, K], k in the packed (sorted) order."""
    out = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=weight.data.device)
    with torch.cuda.device(out.device):
        gemm._dequantize(weight, out, 0, weight.data.shape[0])
    return out
