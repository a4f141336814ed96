"""The specification of the quantized product in plain torch: any bits, groups, act-order, device and float type
(float64 included). Every other kernel is tested against it; where no other takes a module, this serves it.

    y[m, n] = sum over k of x[m, k] * scales[g_idx[k], n] * (q[k, n] - zeros[g_idx[k], n])
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 2**19
"""weights dequantized at a time: 2 MiB of float32, so that a block stays in the cache between its passes"""
_CUDA_BLOCK_ELEMENTS = 2**25
_ROW_STEP = 4
_LEAST_ROWS = 16
_FLOAT32_ROWS = 8


def unpack(qweight: Tensor, bits: int) -> Tensor:
    """int32 [K * bits / 32, N] -> int32 [K, N], values 0 .. 2**bits - 1 (little-endian along K)."""
    if bits == 3:
        return _unpack3(qweight)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=qweight.device)
    fields = qweight.unsqueeze(1) >> shifts.view(1, -1, 1)
    return fields.bitwise_and_((1 << bits) - 1).flatten(0, 1)


def _unpack3(qweight: Tensor) -> Tensor:
    """32 values in 3 words; values 10 and 21 take their upper bits from the next word."""
    words = qweight.view(-1, 3, qweight.shape[1])
    position = torch.arange(0, 96, 3, dtype=torch.int32, device=qweight.device)
    word, shift = position // 32, (position % 32).view(1, -1, 1)
    low = words[:, word] >> shift
    over = (word + 1).clamp_(max=2)
    kept = torch.where(shift > 29, 32 - shift, 3)
    high = words[:, over] << kept
    fields = torch.where(shift > 29, (low & ((1 << kept) - 1)) | high, low)
    return fields.bitwise_and_(7).flatten(0, 1)


def dequantize(
    qweight: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight W^T, `dtype` [K, N]: int32 qweight [K * bits / 32, N], uint8 zeros [G, N], float scales [G, N], int
    [K]."""
    centred = unpack(qweight, bits).sub_(zeros.to(torch.int32).index_select(0, g_idx)).to(dtype)
    return centred.mul_(scales.to(dtype).index_select(0, g_idx))


class ReferenceWeight:
    """A quantized weight kept as in the file and dequantized block by block of outputs at every use."""

    def __init__(
        self, qweight: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, dtype: torch.dtype
    ) -> None:
        self._qweight, self._zeros, self._scales = qweight.contiguous(), zeros, scales
        self._g_idx = g_idx.to(torch.int32)
        self._bits, self._dtype = bits, dtype
        self.in_features, self.out_features = g_idx.shape[0], qweight.shape[1]
        elements = _CUDA_BLOCK_ELEMENTS if qweight.is_cuda else _BLOCK_ELEMENTS
        self._columns = max(64, elements // self.in_features // 64 * 64)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._qweight, self._zeros, self._scales, self._g_idx))

    def matmul(self, x: Tensor) -> Tensor:
        """[M, K] of any float type -> `dtype` [M, N]."""
        num_rows = x.shape[0]
        x = pad_rows(x.to(self._dtype))
        rows_at_once = rows_of_product(x)
        out = torch.empty(x.shape[0], self.out_features, dtype=self._dtype, device=x.device)
        for start in range(0, self.out_features, self._columns):
            part = slice(start, start + self._columns)
            block = dequantize(
                self._qweight[:, part],
                self._zeros[:, part],
                self._scales[:, part],
                self._g_idx,
                self._bits,
                self._dtype,
            )
            if x.is_cuda:
                torch.mm(x, block, out=out[:, part])
                continue
            for first in range(0, x.shape[0], rows_at_once):
                rows = slice(first, first + rows_at_once)
                out[rows, part] = x[rows] @ block
        return out[:num_rows]


def pad_rows(x: Tensor) -> Tensor:
    """Zero rows on the CPU, up to what `rows_of_product` divides.

    BLAS takes other code for a remainder of a few rows, and on some processors (AVX-512 FP16) for few rows, for many,
    and by the number of threads; each sums in an order of its own. A row's result may not depend on how many rows are
    beside it, so float32 products have one number of rows, always; those of bfloat16 are the same from 16 rows on, in
    steps of 4 (both measured bit for bit, and kept by tests).
    """
    if x.is_cuda:
        return x
    step = _FLOAT32_ROWS if x.dtype == torch.float32 else _ROW_STEP
    least = _FLOAT32_ROWS if x.dtype == torch.float32 else _LEAST_ROWS
    missing = max(least, -(-x.shape[0] // step) * step) - x.shape[0]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def rows_of_product(x: Tensor) -> int:
    """How many rows of what `pad_rows` gives are multiplied at a time."""
    return _FLOAT32_ROWS if x.dtype == torch.float32 and not x.is_cuda else max(1, x.shape[0])
