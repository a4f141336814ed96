"""Weights of 2, 3, 4 and 8 bits on the CPU: torch's int4 product in bfloat16.

`aten::_weight_int4pack_mm_for_cpu` computes x W^T with w = (q - 8) * s + z per group of 32, 64, 128 or 256 inputs.
GPTQ's w = (q - zero) * s is z = (8 - zero) * s. Act-order is a permutation of the inputs made once at load and
applied to the activations at each call; larger groups, one group and a partial last group are split into groups the
operator takes. Weights of 2 and 3 bits are kept in four, in the middle of their range, where z is small and loses
little to bfloat16. A weight of 8 bits is the sum of two of four, q = 16 h + l, with scales 16 s and s: two products,
which together read half of what a bfloat16 weight has.

The operator computes every row by itself, so a row's result does not depend on its neighbours. It costs about the
same per row whatever the number of rows, while a dense bfloat16 product gets cheaper: for large matrices and many
rows the weights are dequantized a block at a time instead. Small matrices stay with the operator always: there
independence is worth more than the millisecond.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gptq_api.kernels.reference import unpack

GROUP_SIZES = (256, 128, 64, 32)
_DENSE_MIN_ROWS = 128
_DENSE_MIN_ELEMENTS = 2**21
_PACK_ROWS = 1024
_PANELS = (64, 32)
"""outputs the operator packs together: with AVX-512, and with AVX2"""


def refusal(in_features: int, out_features: int, group_size: int) -> str | None:
    """Why the operator cannot take a module; None where it can. group_size -1: one group."""
    if out_features % 16:
        return f"{out_features} outputs (the int4 operator takes multiples of 16)"
    if operator_group(in_features, group_size) is None:
        return f"groups of {group_size} in {in_features} inputs (the int4 operator takes multiples of 32)"
    return None


def operator_group(in_features: int, group_size: int) -> int | None:
    """The largest group the operator takes that divides both K and the file's group."""
    size = in_features if group_size < 0 else group_size
    return next((g for g in GROUP_SIZES if in_features % g == 0 and size % g == 0), None)


def num_bytes(bits: int, in_features: int, out_features: int, group_size: int) -> int:
    """What `Int4Weight` holds of a module that `refusal` says nothing of; act-order comes on top."""
    group = operator_group(in_features, group_size) or in_features
    plane = in_features * out_features // 2 + in_features // group * out_features * 4
    return plane * _num_planes(bits)


def kind(bits: int) -> str:
    """For people."""
    return {4: "int4", 8: "2 x int4"}.get(bits, f"int4 ({bits} bits kept in 4)")


class Int4Weight:
    """A weight in the operator's packing. Holds nothing else: 0.5 byte per weight (1 for 8 bits), plus scales and zeros
    in bfloat16."""

    def __init__(
        self, qweight: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, group_size: int, bits: int = 4
    ) -> None:
        """Takes the file's tensors (kernels/reference.py has shapes); ValueError where `refusal` would give a
        reason."""
        self.in_features, self.out_features = g_idx.shape[0], qweight.shape[1]
        reason = refusal(self.in_features, self.out_features, group_size)
        if reason is not None:
            raise ValueError(reason)
        group = operator_group(self.in_features, group_size) or 32
        order = torch.argsort(g_idx, stable=True)
        sequential = bool((order[1:] > order[:-1]).all())
        self._order = None if sequential else order
        # One entry per operator group: the file's group of its first input (groups are whole after the permutation).
        groups = g_idx.index_select(0, order)[::group]
        s = scales.to(torch.bfloat16).index_select(0, groups)
        z = zeros.index_select(0, groups).float()
        self._planes: list[_Plane] = []
        middle = 8 + 16 * 8 if bits == 8 else 1 << (bits - 1)
        shift = (middle - z) * s.float()
        for low_bit in range(4 * (_num_planes(bits) - 1), -1, -4):
            packed = _pack(qweight, bits, low_bit, self._order)
            rounded = shift.to(torch.bfloat16)
            self._planes.append(_Plane(packed, group, torch.stack((s * (1 << low_bit), rounded), -1)))
            shift = shift - rounded.float()  # what the first plane could not hold of it

    @property
    def num_bytes(self) -> int:
        order = 0 if self._order is None else self._order.numel() * 8
        return sum(plane.num_bytes for plane in self._planes) + order

    def matmul(self, x: Tensor) -> Tensor:
        """[M, K] of any float type -> bfloat16 [M, N]."""
        if self._order is not None:
            # torch gathers columns of float32 several times faster than of bfloat16.
            x = x.to(torch.float32).index_select(1, self._order)
        x = x.to(torch.bfloat16).contiguous()
        if x.shape[0] >= _DENSE_MIN_ROWS and self.in_features * self.out_features >= _DENSE_MIN_ELEMENTS:
            return self._dense(x)
        product = self._planes[0].product(x)
        for plane in self._planes[1:]:
            product += plane.product(x)
        return product

    def _dense(self, x: Tensor) -> Tensor:
        """The same product through panels of dequantized weights and a dense bfloat16 product."""
        out = x.new_empty(x.shape[0], self.out_features)
        for start in range(0, self.out_features, _panel()):
            panel = self._planes[0].panel(start)
            for plane in self._planes[1:]:
                panel += plane.panel(start)
            out[:, start : start + panel.shape[1]] = x @ panel
        return out


class _Plane:
    """Four bits of every weight: (q - 8) * scale + shift, in the operator's arrangement."""

    def __init__(self, packed: Tensor, group: int, scales_shifts: Tensor) -> None:
        """uint8 [N, K / 2], the operator's group, bfloat16 [K / group, N, 2]."""
        self._packed, self._group, self._scales_shifts = packed, group, scales_shifts
        self.num_bytes = packed.numel() + scales_shifts.numel() * 2

    def product(self, x: Tensor) -> Tensor:
        """bfloat16 [M, K] -> bfloat16 [M, N]"""
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self._packed, self._group, self._scales_shifts)
        return product

    def panel(self, start: int) -> Tensor:
        """A panel of outputs from `start` on, or what is left, dequantized: bfloat16 [K, outputs]."""
        num_outputs, in_features = self._packed.shape[0], self._packed.shape[1] * 2
        width = min(_panel(), num_outputs - start)
        data = self._packed[start : start + width].view(in_features, width // 2)
        columns = torch.cat((data & 15, data >> 4), 1)
        order = _panel_columns(width)
        if order is not None:
            columns = columns.index_select(1, order)
        values = columns.to(torch.bfloat16).sub_(8).view(-1, self._group, width)
        scales, shift = self._scales_shifts[:, start : start + width].permute(2, 0, 1).unsqueeze(2).contiguous()
        return values.mul_(scales).add_(shift).view(in_features, width)


def _num_planes(bits: int) -> int:
    return 2 if bits == 8 else 1


def _pack(qweight: Tensor, bits: int, low_bit: int, order: Tensor | None) -> Tensor:
    """Four bits of every weight, from `low_bit` on: int32 [K * bits / 32, N] -> the operator's uint8 [N, K / 2], a few
    rows of outputs at a time to keep the peak low."""
    parts = []
    for start in range(0, qweight.shape[1], _PACK_ROWS):
        q = unpack(qweight[:, start : start + _PACK_ROWS].contiguous(), bits)
        if bits == 8:
            q = (q >> low_bit) & 15
        elif bits < 4:
            q = q + 8 - (1 << (bits - 1))
        if order is not None:
            q = q.index_select(0, order)
        parts.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.t().contiguous(), 2))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@functools.cache
def _panel() -> int:
    """The outputs of a panel: packed alone, each number of an output is there once."""
    return next(width for width in _PANELS if len(set(_places(width).tolist())) == width)


@functools.cache
def _panel_columns(width: int) -> Tensor | None:
    """Where output n of a panel lies among its low nibbles followed by its high nibbles: int64 [width];
    None where that is in order."""
    place = _places(width)
    return None if bool((place[1:] > place[:-1]).all()) else torch.argsort(place)


def _places(width: int) -> Tensor:
    """The outputs in the order in which their nibbles lie, low ones first: int64 [width].

    The arrangement depends on the instruction set torch found at run time, so it is read off by packing the numbers
    of the outputs, in two passes of four bits.
    """
    numbers = torch.arange(width, dtype=torch.int32).unsqueeze(1).expand(width, 32)
    place = torch.zeros(width, dtype=torch.int64)
    for shift in (0, 4):
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(((numbers >> shift) & 15).contiguous(), 2)
        first = packed.view(32, width // 2)[0].to(torch.int64)
        place |= torch.cat((first & 15, first >> 4)) << shift
    return place
