"""The CUDA kernels with types: `pack` once at load, `gemm` ever after.

    y[M, N] = x[M, K] W^T (+ bias), then SiLU(gate) * up where asked, then + residual

A weight has 4 bits, or 8 in two planes (planes.py), which the same kernels multiply as one of 4 with twice the rows.

Everything runs on the current stream of x's device and may be captured into a CUDA graph. Shapes, types, devices and
alignment are checked here; the extension below takes addresses. Knows nothing about checkpoints or models.

Which kernel: up to 8 rows the decode kernel, whose cost is the bytes of the weight (same bits for a row at any M); from
9 on the wgmma kernel where the device is a Hopper; elsewhere the mma kernel, and for prompts of more than MMA_MAX_M
rows the weight as a 16-bit matrix and torch.mm. These add in other orders. With `same_bits` more rows go to a kernel
that adds in the decode kernel's (ext/gemm/same_bits.cu): a row's result is the same bits for every M. So it is with
`one_order`, of the wgmma or the mma kernel alone, which is faster for many rows, and in another order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from gptq_api.kernels.extension import MISSING, compiled_for, no_code_reason
from gptq_api.kernels.extension import cuda as _cuda
from gptq_api.kernels.layout import PackedLinear
from gptq_api.kernels.pack import pack, refusal
from gptq_api.kernels.workspace import has_wgmma, prepare_same_bits, workspace

__all__ = ["PackedLinear", "gemm", "is_available", "pack", "prepare_same_bits", "refusal", "unavailable_reason"]

DECODE_MAX_M = 8
"""beyond, on an H200, the wgmma kernels overtake the decode kernel: every linear of LLaMA 7B and 13B agrees"""
SAME_BITS_DECODE_MAX_M = 24
"""with `same_bits` on a Hopper, where it takes 16 rows at a time; elsewhere it takes 8, and from the ninth row on the
kernel in its order is faster"""
MMA_MAX_M = 1024
"""beyond, writing the weight as a 16-bit matrix should cost less than cuBLAS gains on the mma kernel: an estimate for
an A100. On an H200 that runs the code of 8.0, cuBLAS has wgmma, and wins from some 500 on"""
ROW_MULTIPLE = 192
"""rows in the tiles that large products are made of; by the times that ext/gemm/wgmma.cu chooses them by, 1,437 rows of
13B take 7 % longer a row than 1,536"""
SCRATCH_BYTES = 128 << 20
"""largest dequantized block: of the order of the L2, small beside any model"""


def unavailable_reason() -> str | None:
    """Why these kernels cannot run here, for people; None where they can."""
    if _cuda is None:
        return MISSING
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    device = torch.cuda.current_device()
    return None if compiled_for(device) else no_code_reason(device)


def is_available() -> bool:
    return unavailable_reason() is None


def gemm(
    x: Tensor,
    weight: PackedLinear,
    out: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    silu_times: Tensor | None = None,
    in_a_row: bool = False,
    same_bits: bool = False,
    one_order: bool = False,
) -> Tensor:
    """x fp16 or bf16 [M, K], rows 16-byte aligned (else copied) -> [M, N], or [M, N/2] with `silu_mul` (paired weights
    only).

    bias [N]; residual like the result, may be `out`. `silu_times`, like the result as well, of planes only: SiLU of
    the product times it, and no residual. Accumulates in float32 and rounds once; with `same_bits` and a float32 `out`,
    never. Same bits every run, and for a row whatever M is within 1..8; with `same_bits`, whatever M is, those of 1..8;
    with `one_order`, whatever M is, bits of their own. Raises ValueError on what does not fit, RuntimeError with the
    shape when a launch fails.

    `in_a_row` is for measurements (probes.py): the kernels before and after are GEMMs of one token as well, and half of
    every SM is left to them. That is 4 to 8 % faster there, and 20 to 25 % slower between norms and attention.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"activations of {x.dtype}; the CUDA kernels take float16 and bfloat16")
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"activations {tuple(x.shape)}, expected [M, {weight.in_features}]")
    if silu_mul and not weight.paired:
        raise ValueError("silu_mul needs a weight packed with paired=True")
    if silu_times is not None and (not weight.planes or residual is not None):
        raise ValueError("silu_times needs a weight of two planes, and no residual beside it")
    of_out = torch.float32 if same_bits and out is not None and out.dtype == torch.float32 else x.dtype
    m, n = x.shape[0], weight.out_features // 2 if silu_mul else weight.out_features
    if out is None:
        out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    for name, tensor, shape, dtype in (
        ("out", out, (m, n), of_out),
        ("residual", residual, (m, n), x.dtype),
        ("silu_times", silu_times, (m, n), x.dtype),
        ("bias", bias, (weight.out_features,), x.dtype),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != x.device or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, last stride {tensor.stride(-1)}; "
                f"expected {shape} {dtype} on {x.device}, last stride 1"
            )
    if x.device != weight.data.device:
        raise ValueError(f"activations on {x.device}, weight on {weight.data.device}")
    if m == 0:
        return out
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    if silu_times is not None:  # in the place of a residual
        silu_mul, residual = True, silu_times
    with torch.cuda.device(x.device):
        if one_order:
            _by_tiles(x, weight, out, bias, residual, silu_mul, _ONE_ORDER)
        elif m <= DECODE_MAX_M or (same_bits and m <= SAME_BITS_DECODE_MAX_M and has_wgmma(x.device.index)):
            _decode(x, weight, out, bias, residual, silu_mul, in_a_row)
        elif same_bits:
            _in_order(x, weight, out, bias, residual, silu_mul)
        elif m <= MMA_MAX_M or has_wgmma(x.device.index):
            _by_tiles(x, weight, out, bias, residual, silu_mul)
        else:
            _by_cublas(x, weight, out, bias, residual, silu_mul)
    return out


def sort_activations(x: Tensor, weight: PackedLinear) -> Tensor:
    """x[:, perm] in one kernel: what `gemm` does first."""
    if weight.perm is None:
        return x
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _cuda.gather(x.data_ptr(), weight.perm.data_ptr(), out.data_ptr(), *x.shape, x.stride(0), out.stride(0), _stream(x))
    return out


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _sizes(x: Tensor, w: PackedLinear, out: Tensor, residual: Tensor | None, silu_mul: bool) -> tuple[int, ...]:
    """What every product of the extension takes after its addresses: M, N, K, the row strides of x, out and residual,
    pairing (ext/common/pairing.h), and the format."""
    strides = (x.stride(0), out.stride(0), 0 if residual is None else residual.stride(0))
    pairing = (4 if silu_mul else 3) if w.planes else (2 if silu_mul else 1) if w.paired else 0
    shape = (x.shape[0], w.num_rows, x.shape[1])
    return (*shape, *strides, pairing, w.groups_per_chunk, w.has_zeros, x.dtype == torch.bfloat16)


def _decode(
    x: Tensor,
    w: PackedLinear,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_mul: bool,
    in_a_row: bool,
) -> None:
    x = sort_activations(x, w)
    addresses = (w.data.data_ptr(), x.data_ptr(), out.data_ptr(), _address(bias), _address(residual))
    floats = out.dtype == torch.float32
    _cuda.decode(*addresses, *_sizes(x, w, out, residual, silu_mul), in_a_row, _stream(x), floats)


def _one_group(w: PackedLinear) -> bool:
    """Whether scales and zero points do not change along k."""
    return w.groups_per_chunk == 1 and not 0 < w.group_size < w.in_features


_ONE_ORDER = 3
"""GemmSplit::kOneOrder of ext/gemm/schedule.cuh"""


def _by_tiles(
    x: Tensor,
    w: PackedLinear,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_mul: bool,
    split: int = 0,
) -> None:
    x = sort_activations(x, w)
    stream = _stream(x)
    sums = workspace(x.device.index, stream)
    fits = out.stride(0) % 8 == 0 and out.data_ptr() % 16 == 0
    y = out if fits else torch.empty_like(out, memory_format=torch.contiguous_format)
    hopper = has_wgmma(x.device.index)
    after = residual if hopper and silu_mul and not w.planes else None  # that kernel does not add to SiLU * up
    add = residual if after is None else None
    if add is not None and (add.stride(0) % 8 or add.data_ptr() % 16):
        add = add.contiguous()
    addresses = (w.data.data_ptr(), x.data_ptr(), y.data_ptr(), _address(bias), _address(add), sums.data_ptr())
    *shape, groups, zeros, bf16 = _sizes(x, w, y, add, silu_mul)
    if hopper:
        _cuda.wgmma(*addresses, *shape, 0 if _one_group(w) else groups, zeros, bf16, 0, 0, split, stream)
    else:
        _cuda.mma(*addresses, *shape, groups, zeros, bf16, 0, split, stream)
    if after is not None:
        y += after
    if not fits:
        out.copy_(y)


@cache
def _same_bits_kernel(device_index: int) -> Any:
    return _cuda.same_bits_wgmma if has_wgmma(device_index) else _cuda.same_bits


def _in_order(
    x: Tensor, w: PackedLinear, out: Tensor, bias: Tensor | None, residual: Tensor | None, silu_mul: bool
) -> None:
    """By tiles, in the decode kernel's order of sums."""
    x = sort_activations(x, w)
    stream = _stream(x)
    sums, floats = workspace(x.device.index, stream, same_bits=True), out.dtype == torch.float32
    fits = floats or (out.stride(0) % 2 == 0 and out.data_ptr() % 4 == 0)
    y = out if fits else torch.empty_like(out, memory_format=torch.contiguous_format)
    if residual is not None and (residual.stride(0) % 2 or residual.data_ptr() % 4):
        residual = residual.contiguous()
    addresses = (w.data.data_ptr(), x.data_ptr(), y.data_ptr(), _address(bias), _address(residual))
    launch = _same_bits_kernel(x.device.index)
    launch(*addresses, sums.data_ptr(), *_sizes(x, w, y, residual, silu_mul), 0, 0, stream, floats)
    if not fits:
        out.copy_(y)


def _dequantize(w: PackedLinear, out: Tensor, first: int, count: int) -> None:
    """The outputs of `count` strips; of paired ones all gates before all ups."""
    shape = (w.num_rows, w.in_features, out.stride(0), first, count)
    format_ = (3 if w.planes else int(w.paired), w.groups_per_chunk, w.has_zeros, out.dtype == torch.bfloat16)
    _cuda.dequant(w.data.data_ptr(), out.data_ptr(), *shape, *format_, _stream(out))


def _by_cublas(
    x: Tensor, w: PackedLinear, out: Tensor, bias: Tensor | None, residual: Tensor | None, silu_mul: bool
) -> None:
    """For devices and sizes without a kernel of ours: SCRATCH_BYTES of the weight at a time as 16-bit matrices (gates
    and their ups where it is paired), then cuBLAS. Rounds once, as our kernels do."""
    x = sort_activations(x, w)
    strips = w.data.shape[0]
    outputs = w.out_features // strips  # of a strip
    at_once = min(strips, max(1, SCRATCH_BYTES // (2 * w.in_features * outputs)))
    scratch = torch.empty(at_once * outputs, w.in_features, dtype=x.dtype, device=x.device)
    halves = 2 if w.paired else 1
    width = outputs // halves
    for first in range(0, strips, at_once):
        count = min(at_once, strips - first)
        _dequantize(w, scratch, first, count)
        weights = torch.split(scratch[: count * outputs], count * width)
        places = [slice((h * strips + first) * width, (h * strips + first + count) * width) for h in range(halves)]
        biases = [None if bias is None else bias[place] for place in places]
        if silu_mul and w.planes:
            assert residual is not None
            gate = _unrounded(x, weights[0], biases[0])
            out[:, places[0]] = torch.nn.functional.silu(gate).mul_(residual[:, places[0]])
            continue
        if silu_mul:
            gate, up = (_unrounded(x, *each) for each in zip(weights, biases, strict=True))
            y = torch.nn.functional.silu(gate).mul_(up)
            out[:, places[0]] = y if residual is None else y.add_(residual[:, places[0]])
            continue
        for weight, place, its_bias in zip(weights, places, biases, strict=True):
            added = its_bias if residual is None else residual[:, place]
            if added is None:
                torch.mm(x, weight.t(), out=out[:, place])
            elif its_bias is None or residual is None:
                torch.addmm(added, x, weight.t(), out=out[:, place])
            else:
                out[:, place] = _unrounded(x, weight, its_bias).add_(added)


def _unrounded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.mm(x, weight.t(), out_dtype=torch.float32)
    return y if bias is None else y.add_(bias)
