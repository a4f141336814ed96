"""Linear layers in plain torch. Which kernel holds a weight is decided once, at load, by the device's Backend."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from gptq_api.kernels.order import InputOrder
from gptq_api.kernels.reference import pad_rows, rows_of_product
from gptq_api.model.layers.activation import silu_and_multiply


class Weight(Protocol):
    """What a kernel module keeps of a quantized weight, in its own packing."""

    in_features: int
    out_features: int

    @property
    def num_bytes(self) -> int: ...

    def matmul(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N]"""
        ...


class Linear(Protocol):
    """y = x W^T + b: [M, K] -> [M, N]."""

    kernel: str
    """for people"""

    @property
    def order(self) -> InputOrder | None:
        """Act-order that is not sorted away; only packed CUDA weights have one."""
        ...

    @property
    def num_bytes(self) -> int: ...

    def forward(
        self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None, silu_mul: bool = False
    ) -> Tensor:
        """`silu_mul`: SiLU of the first half of y times the second half, [M, N / 2]. Then `residual` is added; it may
        be `out`, which holds the result where given."""
        ...


class PlainLinear:
    """A quantized Linear whose kernel computes the product alone."""

    order = None

    def __init__(self, weight: Weight, bias: Tensor | None, kernel: str) -> None:
        self.weight, self.bias, self.kernel = weight, bias, kernel

    @property
    def num_bytes(self) -> int:
        return self.weight.num_bytes + (0 if self.bias is None else self.bias.numel() * self.bias.element_size())

    def forward(
        self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None, silu_mul: bool = False
    ) -> Tensor:
        y = self.weight.matmul(x)
        return finish(y if self.bias is None else y.add_(self.bias), out, residual, silu_mul)


class DenseLinear:
    """An unquantized Linear: a weight [N, K] of one float type; activations are cast to it."""

    order = None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, kernel: str | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.kernel = kernel or f"dense {str(weight.dtype).removeprefix('torch.')}"

    @property
    def num_bytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.weight.numel() * self.weight.element_size() + bias

    def shares(self, weight: Tensor) -> bool:
        """Whether this is in the memory of `weight` (a head tied to the embedding, or a rank's part of one)."""
        begin = weight.data_ptr()
        return begin <= self.weight.data_ptr() < begin + weight.numel() * weight.element_size()

    def forward(
        self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None, silu_mul: bool = False
    ) -> Tensor:
        x = x.to(self.weight.dtype)
        padded = pad_rows(x)
        rows = torch.split(padded, rows_of_product(padded))
        parts = [functional.linear(part, self.weight, self.bias) for part in rows]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return finish(y[: x.shape[0]], out, residual, silu_mul)


class SplitLinear:
    """Several Linears with the same input whose outputs are read as one, where they cannot be merged into one
    weight."""

    order = None

    def __init__(self, parts: list[Linear]) -> None:
        self.parts = parts
        self.kernel = " + ".join(dict.fromkeys(part.kernel for part in parts))

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def forward(
        self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None, silu_mul: bool = False
    ) -> Tensor:
        return finish(torch.cat([part.forward(x) for part in self.parts], -1), out, residual, silu_mul)


def finish(y: Tensor, out: Tensor | None, residual: Tensor | None, silu_mul: bool) -> Tensor:
    """What a fused kernel does on the way, one step after the other."""
    if silu_mul:
        y = silu_and_multiply(y)
    if residual is not None:
        return torch.add(y, residual, out=out)
    return y if out is None else out.copy_(y)
