"""Act-order: weights are stored with their inputs sorted by group, and somebody has to bring x into that order.

norm ── writes it sorted (producer) ──> qkv        attention ── (producer up to 8 rows, else kernel) ──> o
norm ── writes it sorted (producer) ──> gate_up ── (nobody: its outputs are stored in down's order) ──> down
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class InputOrder:
    """The order in which a Linear's weight has its inputs, where that is not the order of x."""

    index: Tensor
    """int32 [K]: stored input i is x[:, index[i]]"""
    applied_by: Literal["producer", "kernel"]
    """producer: whoever makes x writes it in this order; kernel: the Linear gathers by itself"""


def of_producer(order: InputOrder | None) -> Tensor | None:
    """The index that whoever makes x has to apply."""
    return order.index if order is not None and order.applied_by == "producer" else None


def of_kernel(order: InputOrder | None) -> Tensor | None:
    """The index that the Linear applies to x by itself."""
    return order.index if order is not None and order.applied_by == "kernel" else None
