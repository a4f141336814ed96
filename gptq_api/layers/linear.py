"""Linear layers. A quantized one is a weight that knows its product; which kernel holds the weight is decided once,
at load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from gptq_api.kernels import cpu, gemm
from gptq_api.kernels.layout import PackedLinear
from gptq_api.kernels.reference import ReferenceWeight, pad_rows, rows_of_product
from gptq_api.layers.activation import silu_and_multiply


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

    path: str
    """for people: the kernel, and why where it is a slow one"""
    perm: Tensor | None
    """int32 [K]: `forward` takes x[:, perm], which whoever makes x does at no cost; None: x as it is. Only packed CUDA
    weights of act-order checkpoints have one."""

    @property
    def num_bytes(self) -> int: ...

    def forward(
        self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None, silu_mul: bool = False
    ) -> Tensor:
        """`silu_mul`: SiLU of the first half of y times the second half, [M, N / 2]. Then `residual` is added; it may
        be `out`, which holds the result where given."""
        ...


@dataclass(frozen=True)
class KernelChoice:
    """Which kernel takes a module; `reason` says why it is the reference where that is slow."""

    kernel: str
    reason: str | None = None

    def __str__(self) -> str:
        return self.kernel if self.reason is None else f"{self.kernel}: {self.reason}"


def choose_kernel(
    bits: int, in_features: int, out_features: int, group_size: int, device: torch.device, dtype: torch.dtype
) -> KernelChoice:
    """From numbers alone, so that `inspect` can tell without weights."""
    if device.type == "cuda":
        if dtype == torch.float32:
            return KernelChoice("reference (exact)")
        reason = gemm.refusal(bits, in_features, out_features, group_size) or gemm.unavailable_reason()
        return KernelChoice("cuda int4" if reason is None else "reference", reason)
    if dtype != torch.bfloat16:
        return KernelChoice("reference (exact)")
    reason = cpu.refusal(bits, in_features, out_features, group_size)
    return KernelChoice("int4" if reason is None else "reference", reason)


class GPTQLinear:
    """A quantized Linear whose kernel computes the product alone: everything on the CPU, and on CUDA the reference."""

    def __init__(self, weight: Weight, bias: Tensor | None, path: str) -> None:
        self._weight, self._bias, self.path = weight, bias, path
        self.perm: Tensor | None = None

    @classmethod
    def load(
        cls,
        qweight: Tensor,
        zeros: Tensor,
        scales: Tensor,
        g_idx: Tensor,
        bits: int,
        group_size: int,
        bias: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> GPTQLinear:
        """int32 qweight [K * bits / 32, N], uint8 zeros [G, N], scales [G, N], int32 g_idx [K], bias [N]; on the CPU,
        or on `device` already. Not for what `choose_kernel` gives to "cuda int4"."""
        choice = choose_kernel(bits, g_idx.shape[0], qweight.shape[1], group_size, device, dtype)
        weight: Weight
        if choice.kernel == "int4":
            weight = cpu.Int4Weight(qweight, zeros, scales, g_idx, group_size)
        else:
            # Loading may map the file; what is kept is memory of our own.
            qweight, zeros, scales, g_idx = (_own(t, device) for t in (qweight, zeros, scales, g_idx))
            weight = ReferenceWeight(qweight, zeros, scales, g_idx, bits, dtype)
        return cls(weight, None if bias is None else bias.to(device=device, dtype=dtype), str(choice))

    @property
    def num_bytes(self) -> int:
        return self._weight.num_bytes + (0 if self._bias is None else self._bias.numel() * self._bias.element_size())

    def forward(
        self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None, silu_mul: bool = False
    ) -> Tensor:
        y = self._weight.matmul(x)
        return _finish(y if self._bias is None else y.add_(self._bias), out, residual, silu_mul)


class PackedGPTQLinear:
    """A quantized Linear in the packing of the CUDA kernels; product, bias, SiLU * up and residual are one launch.

    `folded`: whoever makes x applies `perm`. Otherwise `perm` is None and the kernel gathers by itself.
    """

    path = "cuda int4"

    def __init__(self, weight: PackedLinear, bias: Tensor | None, *, folded: bool) -> None:
        """`bias` [N] on the device in the activations' type, in the order of the weight's outputs."""
        self.perm = weight.perm if folded else None
        self._weight, self._bias = weight.without_perm() if folded else weight, bias

    @property
    def num_bytes(self) -> int:
        tensors = (self._weight.data, self.perm, self._weight.perm, self._bias)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def gather(self) -> Tensor | None:
        """int32 [K]: the order in which the kernel picks its inputs from x; None: as they come."""
        return self._weight.perm

    def without_gather(self) -> PackedGPTQLinear:
        """The same weight for an x that comes in the order of `gather` by the way it is made."""
        return PackedGPTQLinear(self._weight.without_perm(), self._bias, folded=False)

    def forward(
        self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None, silu_mul: bool = False
    ) -> Tensor:
        return gemm.gemm(x, self._weight, out, bias=self._bias, residual=residual, silu_mul=silu_mul)


def _finish(y: Tensor, out: Tensor | None, residual: Tensor | None, silu_mul: bool) -> Tensor:
    """What a fused kernel does on the way, one step after the other."""
    if silu_mul:
        y = silu_and_multiply(y)
    if residual is not None:
        return torch.add(y, residual, out=out)
    return y if out is None else out.copy_(y)


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.clone() if device.type == "cpu" else tensor.to(device)


class DenseLinear:
    """An unquantized Linear: a weight [N, K] of one float type; activations are cast to it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self._bias = weight, bias
        self.perm: Tensor | None = None
        self.path = f"dense {str(weight.dtype).removeprefix('torch.')}"

    @property
    def num_bytes(self) -> int:
        bias = 0 if self._bias is None else self._bias.numel() * self._bias.element_size()
        return self.weight.numel() * self.weight.element_size() + bias

    def shares(self, weight: Tensor) -> bool:
        """Whether this is the same memory as `weight` (a head tied to the embedding)."""
        return self.weight.data_ptr() == weight.data_ptr()

    def forward(
        self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None, silu_mul: bool = False
    ) -> Tensor:
        x = x.to(self.weight.dtype)
        if x.is_cuda and not silu_mul and (self._bias is None or residual is None):
            added = self._bias if residual is None else residual
            if added is None:
                return torch.mm(x, self.weight.t(), out=out)
            return torch.addmm(added, x, self.weight.t(), out=out)
        padded = pad_rows(x)
        rows = torch.split(padded, rows_of_product(padded))
        parts = [functional.linear(part, self.weight, self._bias) for part in rows]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return _finish(y[: x.shape[0]], out, residual, silu_mul)


class SplitLinear:
    """Several Linears with the same input whose outputs are read as one, where they cannot be merged into one
    weight."""

    def __init__(self, parts: list[Linear]) -> None:
        self._parts = parts
        self.perm: Tensor | None = None
        self.path = " + ".join(dict.fromkeys(part.path for part in parts))

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self._parts)

    def forward(
        self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None, silu_mul: bool = False
    ) -> Tensor:
        return _finish(torch.cat([part.forward(x) for part in self._parts], -1), out, residual, silu_mul)
