"""The product of the output head on CUDA: weights of 16 bits, float32 logits.

    logits[M, V] = x[M, H] W[V, H]^T

A row has the same bits whatever M is and whoever its companions are, eager and in a graph: every logit is one chain of
tensor core products along H. On a Hopper they are wgmma's, elsewhere mma.sync's; nothing relies on both having the same
bits, so bits are those of a device and a build. Runs on the current stream of x's device and may be captured into a
CUDA graph. Shapes, types, devices and alignment are checked here; the extension takes addresses.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from gptq_api.kernels.extension import cuda as _cuda

__all__ = ["head"]


def head(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x fp16 or bf16 [M, H], rows 16-byte aligned (else copied); weight [V, H] of its type, contiguous, H a multiple of
    8; out float32 [M, V], columns side by side. Returns out, a new one where none is given. The kernel before on the
    stream must not write the weight, whose first bytes are read while that one is still at work.

    Sums are float32 and never rounded to 16 bits. Raises ValueError on what does not fit, RuntimeError with the shape
    when a launch fails.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"activations of {x.dtype}; the head's kernel takes float16 and bfloat16")
    if weight.dim() != 2 or weight.dtype != x.dtype or weight.device != x.device or not weight.is_contiguous():
        raise ValueError(
            f"weight {list(weight.shape)} {weight.dtype} on {weight.device}, strides {weight.stride()}; expected "
            f"contiguous [V, H] {x.dtype} on {x.device}"
        )
    size, width = weight.shape
    if width % 8 or weight.data_ptr() % 16:
        raise ValueError(f"weight {list(weight.shape)}; the head's kernel takes a multiple of 8, rows 16-byte aligned")
    if x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"activations {list(x.shape)}, expected [M, {width}]")
    m = x.shape[0]
    if out is None:
        out = torch.empty(m, size, dtype=torch.float32, device=x.device)
    fits = tuple(out.shape) == (m, size) and out.stride(1) == 1 and (m < 2 or out.stride(0) >= size)
    if not fits or out.dtype != torch.float32 or out.device != x.device:
        raise ValueError(
            f"out {list(out.shape)} {out.dtype} on {out.device}, strides {out.stride()}; expected [{m}, {size}] "
            f"torch.float32 on {x.device}, last stride 1"
        )
    if m == 0:
        return out
    if x.stride(1) != 1 or x.stride(0) % 8 or x.stride(0) < width or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    with torch.cuda.device(x.device):
        arguments = (weight.data_ptr(), x.data_ptr(), out.data_ptr(), m, size, width)
        strides, bf16 = (x.stride(0), max(out.stride(0), size)), x.dtype == torch.bfloat16
        stream = torch.cuda.current_stream(x.device).cuda_stream
        if _has_wgmma(x.device.index):
            _cuda.head_wgmma(*arguments, *strides, bf16, 0, stream)
        else:
            _cuda.head(*arguments, *strides, bf16, 0, stream)
    return out


@cache
def _has_wgmma(device_index: int) -> bool:
    return hasattr(_cuda, "head_wgmma") and torch.cuda.get_device_capability(device_index) == (9, 0)
