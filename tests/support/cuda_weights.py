"""Random GPTQ weights as a checkpoint holds them, with the float64 matrix they stand for. For the tests of the CUDA
layout and kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GPTQTensors:
    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor | None
    group_size: int
    dense: Tensor
    """float64 [K, N]"""


def random_weight(
    k: int, n: int, group_size: int, *, asym: bool, act_order: bool, device: str = "cpu", seed: int = 0, bits: int = 4
) -> GPTQTensors:
    """Zero points 0..16, or 0..255 of 8 bits, both ends included."""
    g = torch.Generator(device=device).manual_seed(seed + k + n)
    size = k if group_size == -1 else group_size
    groups = -(-k // size)
    values = torch.randint(0, 2**bits, (k, n), generator=g, device=device)
    scales = (torch.rand(groups, n, generator=g, device=device) * 0.02 + 0.001).half()
    zeros = None
    if asym:
        top = 16 if bits == 4 else 255
        zeros = torch.randint(0, top + 1, (groups, n), generator=g, device=device).to(torch.uint8)
        zeros[0, 0], zeros[-1, -1] = 0, top
    g_idx = torch.arange(k, device=device) // size
    if act_order:
        g_idx = g_idx[torch.randperm(k, generator=g, device=device)]
    in_word = 32 // bits
    shifts = bits * torch.arange(in_word, device=device).view(1, in_word, 1)
    words = (values.view(k // in_word, in_word, n) << shifts).sum(1)
    qweight = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    offset = torch.full_like(scales, 2.0 ** (bits - 1)) if zeros is None else zeros
    dense = (values.double() - offset.double()[g_idx]) * scales.double()[g_idx]
    return GPTQTensors(qweight, scales, zeros, g_idx.to(torch.int32) if act_order else None, group_size, dense)
