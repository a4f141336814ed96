"""Root mean square normalisation (arXiv:1910.07467), computed in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class RMSNorm:
    def __init__(self, weight: Tensor, eps: float) -> None:
        """weight [H], kept in float32: a few KiB, and every product is exact."""
        self.weight, self.eps = weight.to(torch.float32), eps

    def forward(self, x: Tensor) -> Tensor:
        """[M, H] -> the same shape and type."""
        y = functional.rms_norm(x.to(torch.float32), self.weight.shape, self.weight, self.eps)
        return y.to(x.dtype)


class HeadNorm:
    """RMSNorm of every head of q and k by itself (Qwen3)."""

    def __init__(self, q_weight: Tensor, k_weight: Tensor, num_heads: int, num_kv_heads: int, eps: float) -> None:
        """Both weights [head_dim]; kept in float32, one row per head of q and then of k."""
        self.q_weight, self.k_weight, self._eps = q_weight, k_weight, eps
        rows = [q_weight.expand(num_heads, -1), k_weight.expand(num_kv_heads, -1)]
        self.weight = torch.cat(rows).to(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [M, heads + kv heads, head_dim] -> the same shape."""
        return functional.rms_norm(x, x.shape[-1:], None, self._eps) * self.weight
