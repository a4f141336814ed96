"""A product of RMSNorm(x): what qkv and gate_up of a layer are.

With few rows the decode kernel normalizes by itself, so that no kernel of its own stands before it. Otherwise rms_norm
leaves its result in a buffer first. Both give the same bits. GPTQ_CUDA_NORM=apart in the environment takes the second
way always, for measurements.
"""

from __future__ import annotations

import os

from torch import Tensor

from gptq_api.kernels.gemm import gemm, normalizes
from gptq_api.kernels.layout import PackedLinear
from gptq_api.kernels.ops import Norm, rms_norm

NORMALIZES_MAX_M = 4
"""rows up to which the decode kernel does it: each of its blocks normalizes all of them, so that many would take longer
than where each has a block of its own"""
_APART = os.environ.get("GPTQ_CUDA_NORM") == "apart"


def normed_gemm(
    x: Tensor,
    norm: Norm,
    weight: PackedLinear,
    out: Tensor,
    normed: Tensor,
    *,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    same_bits: bool = False,
    one_order: bool = False,
) -> Tensor:
    """`gemm` of RMSNorm(x), to `out`; `normed` [M, K], like x, is written where a kernel of its own normalizes. x stays
    as it is. Which way it goes depends on sizes and device alone."""
    inside = not _APART and not one_order and 0 < len(x) <= NORMALIZES_MAX_M
    if inside and normalizes(weight, len(x), norm):
        return gemm(x, weight, out, bias=bias, silu_mul=silu_mul, norm=norm)
    rms_norm(x, norm.weight, norm.eps, normed, norm.order)
    return gemm(normed, weight, out, bias=bias, silu_mul=silu_mul, same_bits=same_bits, one_order=one_order)
