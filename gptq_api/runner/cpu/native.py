"""Products on the CPU by our own kernels (`ext/cpu`).

Quantized weights, rounded: each group of a row of activations is rounded to signed bytes with one scale. A product of
bytes by the weights' unsigned integers is summed exactly within a group, and groups are added in float32 in the order
of the inputs, so a row's result is the same bits whatever else is in the batch, and on any number of threads. Rounding
costs some 0.6 % of a product's norm (llama.cpp rounds the same way for its Q4_0).

Quantized weights, exact: the same weights by float32 activations. A weight less its zero point is an exact integer;
products are summed in float32 within a group, in the order of the inputs, and groups as above.

Dense weights of 16 bits, such as the head: exact products, summed in float32 in one order for any number of rows.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from gptq_api.checkpoint.large_pages import weight_memory
from gptq_api.model.layers.linear import DenseLinear, finish

try:
    from gptq_api import _cpu as _module  # type: ignore[attr-defined, unused-ignore]
except ImportError as error:  # installed without a C++ compiler
    _cpu: Any = None
    MISSING = f"gptq-api was installed without its CPU kernels ({error}); install again with a C++ compiler on PATH"
else:
    _cpu = _module
    MISSING = ""
    """why there are none, for people"""

GROUPS = (128, 64, 32)
"""inputs that share a scale of the activations"""
LAYOUT = "strips of 16, 1"
"""of packed weights that are kept from one start to the next; another one for whatever packs differently"""
_STRIP = 16
_num_threads = 0
KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


def held(dtype: torch.dtype) -> torch.dtype:
    """What unquantized weights stored so are computed with: float32 for what the kernels have not."""
    return dtype if dtype in KINDS else torch.float32


def module() -> Any:
    return _cpu


def is_available() -> bool:
    return _cpu is not None


def use_threads(num_threads: int) -> None:
    """How many threads compute from now on; torch's own number where nobody says."""
    global _num_threads
    _num_threads = num_threads


def num_threads() -> int:
    return _num_threads or torch.get_num_threads()


def engine() -> Any:
    """What this process computes with: the best instruction set, or the one that the environment variable
    GPTQ_CPU_INSTRUCTION_SET names. ValueError for one that this processor has not."""
    return _engine(num_threads(), os.environ.get("GPTQ_CPU_INSTRUCTION_SET", ""))


@functools.lru_cache(maxsize=1)
def _engine(num_threads: int, instruction_set: str) -> Any:
    return _cpu.Engine(num_threads, instruction_set)


def kind(exact: bool = False) -> str:
    """Of the quantized product, for people."""
    activations = "float32" if exact else "int8"
    return f"{activations} activations ({engine().instruction_set})" if is_available() else "none"


def num_bytes(bits: int, in_features: int, out_features: int, group_size: int) -> int:
    """What a QuantizedWeight holds, at most: only act-order needs the permutation."""
    size = in_features if group_size < 0 else min(group_size, in_features)
    group = _packed_group([size] if in_features > size else [])
    places = in_features // size * -(-size // group) * group + -(-(in_features % size) // group) * group
    outputs = -(-out_features // _STRIP) * _STRIP
    stored = 8 if bits == 8 else 4
    return places * outputs * stored // 8 + places // group * outputs * 3 + places * 4


class QuantizedWeight:
    """A weight of 2, 3, 4 or 8 bits: half a byte per weight up to 4 bits, one with 8, plus scales and zeros."""

    def __init__(
        self, qweight: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, *, exact: bool = False
    ) -> None:
        """Takes the file's tensors; kernels/reference.py has their shapes. `exact`: activations are not rounded."""
        self._exact = exact
        self.in_features, self.out_features = g_idx.shape[0], qweight.shape[1]
        self._bits = 8 if bits == 8 else 4
        places, groups, self._group = _places(g_idx)
        in_order = len(places) == self.in_features and bool((places == torch.arange(len(places))).all())
        self._order = None if in_order else places.to(torch.int32)
        self._q = _packed(qweight, bits, places)
        kind = held(scales.dtype)
        self._kind = KINDS[kind]
        self._scales = _strips(scales.to(kind).index_select(0, groups))
        self._zeros = _strips(zeros.index_select(0, groups))

    def packed(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All that it holds, for `of_packed`: tensors and numbers by name. Raise LAYOUT where they change."""
        order = {} if self._order is None else {"order": self._order}
        numbers = {"inputs": self.in_features, "outputs": self.out_features, "group": self._group, "bits": self._bits}
        return {"q": self._q, "scales": self._scales, "zeros": self._zeros, **order}, numbers

    @classmethod
    def of_packed(cls, tensors: dict[str, Tensor], numbers: dict[str, int], *, exact: bool = False) -> QuantizedWeight:
        weight = cls.__new__(cls)
        weight._exact = exact
        weight._q, weight._scales, weight._zeros = tensors["q"], tensors["scales"], tensors["zeros"]
        weight._order, weight._kind = tensors.get("order"), KINDS[tensors["scales"].dtype]
        weight.in_features, weight.out_features = numbers["inputs"], numbers["outputs"]
        weight._group, weight._bits = numbers["group"], numbers["bits"]
        return weight

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.packed()[0].values())

    def matmul(self, x: Tensor) -> Tensor:
        """[M, K] of any float type -> float32 [M, N]."""
        x = _rows(x)
        y = torch.empty(x.shape[0], self.out_features)
        engine().quantized(self.fields(), x.data_ptr(), x.stride(0), x.shape[0], y.data_ptr(), y.stride(0))
        return y

    def fields(self) -> tuple[int, ...]:
        """What ext/cpu/linear.h calls Quantized."""
        return (
            self._q.data_ptr(),
            self._scales.data_ptr(),
            self._zeros.data_ptr(),
            0 if self._order is None else self._order.data_ptr(),
            self.out_features,
            self._scales.shape[1] * self._group,
            self.in_features,
            self._group,
            self._bits,
            self._kind,
            self._exact,
        )


class DenseHead(DenseLinear):
    """An unquantized Linear [N, K] in the type that the checkpoint has it in, which may be the embedding's memory."""

    def __init__(self, weight: Tensor) -> None:
        weight = weight.to(held(weight.dtype))
        kernel = f"dense {str(weight.dtype).removeprefix('torch.')} ({engine().instruction_set})"
        super().__init__(weight.contiguous(), kernel=kernel)

    def forward(
        self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None, silu_mul: bool = False
    ) -> Tensor:
        """float32 [M, N]."""
        x, weight = _rows(x), self.weight
        y = torch.empty(x.shape[0], weight.shape[0])
        engine().dense(
            w=weight.data_ptr(),
            kind=KINDS[weight.dtype],
            N=weight.shape[0],
            K=weight.shape[1],
            x=x.data_ptr(),
            ldx=x.stride(0),
            M=x.shape[0],
            y=y.data_ptr(),
            ldy=y.stride(0),
        )
        return finish(y, out, residual, silu_mul)


def _rows(x: Tensor) -> Tensor:
    x = x.to(torch.float32)
    return x if x.stride(1) == 1 else x.contiguous()


def _packed_group(sizes: list[int]) -> int:
    """The largest group of the packed layout that groups of these sizes are whole numbers of; the least where there is
    none, and they are padded."""
    return next((group for group in GROUPS if all(size % group == 0 for size in sizes)), GROUPS[-1])


def _places(g_idx: Tensor) -> tuple[Tensor, Tensor, int]:
    """(the input at each packed place, -1 where one pads; the file's group of each packed group; inputs of a packed
    group). The inputs of a group of the file stand together."""
    order = torch.argsort(g_idx, stable=True)
    found, sizes = torch.unique_consecutive(g_idx.index_select(0, order), return_counts=True)
    group = _packed_group(sizes[:-1].tolist())  # the last one may be partial, and is padded
    padded = -(-sizes // group) * group
    places = torch.full((int(padded.sum()),), -1, dtype=torch.int64)
    starts, filled = torch.cumsum(padded, 0) - padded, torch.cumsum(sizes, 0) - sizes
    places[torch.arange(len(order)) + torch.repeat_interleave(starts - filled, sizes)] = order.to(torch.int64)
    return places, torch.repeat_interleave(found.to(torch.int64), padded // group), group


def _packed(qweight: Tensor, bits: int, places: Tensor) -> Tensor:
    """The file's int32 [K * bits / 32, N] -> what ext/cpu/linear.h describes."""
    qweight, places = qweight.contiguous(), places.to(torch.int32)
    num_outputs = -(-qweight.shape[1] // _STRIP) * _STRIP
    packed = weight_memory((num_outputs * len(places) * (8 if bits == 8 else 4) // 8,), torch.uint8)
    engine().pack(
        qweight=qweight.data_ptr(),
        N=qweight.shape[1],
        bits=bits,
        places=places.data_ptr(),
        K=len(places),
        out=packed.data_ptr(),
    )
    return packed


def _strips(values: Tensor) -> Tensor:
    """[G, N] -> [N / 16, G, 16], the last strip padded by zeros."""
    if missing := -values.shape[1] % _STRIP:
        values = torch.nn.functional.pad(values, (0, missing))
    strips = values.view(values.shape[0], -1, _STRIP).transpose(0, 1)
    return weight_memory(tuple(strips.shape), values.dtype).copy_(strips)
