"""Root mean square normalisation (arXiv:1910.07467), computed in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class RMSNorm:
    def __init__(self, weight: Tensor, eps: float) -> None:
        """weight [H], kept in float32: a few KiB, and every product is exact."""
        self._weight, self._eps = weight.to(torch.float32), eps

    def forward(self, x: Tensor) -> Tensor:
        """[M, H] -> the same shape and type."""
        y = functional.rms_norm(x.to(torch.float32), self._weight.shape, self._weight, self._eps)
        return y.to(x.dtype)
