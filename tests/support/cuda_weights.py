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
    k: int, n: int, group_size: int, *, asym: bool, act_order: bool, device: str = "cpu", seed: int = 0
) -> GPTQTensors:
    """Zero points 0..16, both ends included."""
    g = torch.Generator(device=device).manual_seed(seed + k + n)
    size = k if group_size == -1 else group_size
    groups = -(-k // size)
    values = torch.randint(0, 16, (k, n), generator=g, device=device)
    scales = (torch.rand(groups, n, generator=g, device=device) * 0.02 + 0.001).half()
    zeros = None
    if asym:
        zeros = torch.randint(0, 17, (groups, n), generator=g, device=device).to(torch.uint8)
        zeros[0, 0], zeros[-1, -1] = 0, 16
    g_idx = torch.arange(k, device=device) // size
    if act_order:
        g_idx = g_idx[torch.randperm(k, generator=g, device=device)]
    shifts = 4 * torch.arange(8, device=device).view(1, 8, 1)
    words = (values.view(k // 8, 8, n) << shifts).sum(1)
    qweight = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    offset = torch.full_like(scales, 8.0) if zeros is None else zeros
    dense = (values.double() - offset.double()[g_idx]) * scales.double()[g_idx]
    return GPTQTensors(qweight, scales, zeros, g_idx.to(torch.int32) if act_order else None, group_size, dense)
