"""Linears of the CUDA kernels."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from gptq_api.kernels import gemm
from gptq_api.kernels.layout import PackedLinear
from gptq_api.kernels.order import InputOrder, of_kernel
from gptq_api.model.layers.linear import DenseLinear, finish

KERNELS = {4: "cuda int4", 8: "cuda int8"}
"""by bits, for people"""


class PackedGPTQLinear:
    """A quantized Linear in the packing of the CUDA kernels; product, bias, SiLU * up and residual are one launch."""

    def __init__(
        self, weight: PackedLinear, bias: Tensor | None, *, sorted_by_producer: bool, same_bits: bool = False
    ) -> None:
        """`bias` [N] on the device in the activations' type, in the order of the weight's outputs.
        `sorted_by_producer`: whoever makes x applies act-order; otherwise the kernel gathers by itself.
        `same_bits`: a row's result does not depend on how many there are; products of more than 8 take longer."""
        self.order: InputOrder | None = None
        if weight.perm is not None:
            self.order = InputOrder(weight.perm, "producer" if sorted_by_producer else "kernel")
        self._weight, self._bias = weight if of_kernel(self.order) is not None else weight.without_perm(), bias
        self._same_bits, self._one_order, self.kernel = same_bits, False, KERNELS[8 if weight.planes else 4]
        if same_bits:
            gemm.prepare_same_bits(weight.data.device)

    @property
    def num_bytes(self) -> int:
        index = None if self.order is None else self.order.index
        tensors = (self._weight.data, index, self._bias)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def in_order(self) -> PackedGPTQLinear:
        """The same weight for an x that is made in its order anyway."""
        weight = self._weight.without_perm()
        return PackedGPTQLinear(weight, self._bias, sorted_by_producer=False, same_bits=self._same_bits)

    def for_prompts(self) -> PackedGPTQLinear:
        """The same weight by kernels for many rows; a row's bits are others then, and depend on nothing else either."""
        found = copy.copy(self)
        found._one_order = True
        return found

    def forward(
        self,
        x: Tensor,
        out: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        silu_mul: bool = False,
        silu_times: Tensor | None = None,
    ) -> Tensor:
        """`silu_times`: see `gemm`."""
        return gemm.gemm(
            *(x, self._weight, out),
            bias=self._bias,
            residual=residual,
            silu_mul=silu_mul,
            silu_times=silu_times,
            same_bits=self._same_bits,
            one_order=self._one_order,
        )


class PackedGateUp:
    """Gate and up of 8 bits: an output would have four rows, and a lane of a strip has two. So they are two products,
    the second of which multiplies SiLU of its sums with what the first one left."""

    def __init__(self, gate: PackedGPTQLinear, up: PackedGPTQLinear) -> None:
        """Both have their inputs in one order."""
        self.gate, self.up, self.order, self.kernel = gate, up, gate.order, gate.kernel

    @property
    def num_bytes(self) -> int:
        return self.gate.num_bytes + self.up.num_bytes

    def for_prompts(self) -> PackedGateUp:
        return PackedGateUp(self.gate.for_prompts(), self.up.for_prompts())

    def forward(
        self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None, silu_mul: bool = False
    ) -> Tensor:
        if not silu_mul:
            return finish(torch.cat((self.gate.forward(x), self.up.forward(x)), -1), out, residual, silu_mul=False)
        y = self.up.forward(x, out if residual is None else None)
        self.gate.forward(x, y, silu_times=y)
        return y if residual is None else finish(y, out, residual, silu_mul=False)


class PackedHead(PackedGPTQLinear):
    """A quantized output head: logits in float32, never rounded to 16 bits, and the same bits for any number of
    rows."""

    def __init__(self, weight: PackedLinear, bias: Tensor | None, size: int, kernel: str | None = None) -> None:
        """`size`: V, of the logits; the weight may have a few outputs more. `kernel`: for people."""
        super().__init__(weight, bias, sorted_by_producer=False, same_bits=True)
        self._size, self.kernel = size, kernel or self.kernel

    def logits(self, x: Tensor, out: Tensor) -> Tensor:
        """[M, H] -> out, float32 [M, V]."""
        if self._weight.out_features == self._size:
            return self.forward(x, out)
        y = torch.empty(x.shape[0], self._weight.out_features, dtype=torch.float32, device=x.device)
        return out.copy_(self.forward(x, y)[:, : self._size])


class CudaDenseLinear(DenseLinear):
    """cuBLAS adds the bias or the residual on its way."""

    def forward(
        self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None, silu_mul: bool = False
    ) -> Tensor:
        x = x.to(self.weight.dtype)
        if silu_mul or (self.bias is not None and residual is not None):
            return finish(torch.nn.functional.linear(x, self.weight, self.bias), out, residual, silu_mul)
        added = self.bias if residual is None else residual
        if added is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(added, x, self.weight.t(), out=out)
