"""What a device has to say while a model is loaded and planned: which kernel takes a Linear, in what type tensors are
kept, how a Linear is made of them. The devices stand in runner/backends.py."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gptq_api.checkpoint.checkpoint import Checkpoint, GPTQTensors
from gptq_api.errors import UserError
from gptq_api.model.layers.linear import Linear


@dataclass(frozen=True)
class KernelChoice:
    """Which kernel takes a Linear, and what it keeps of it."""

    kind: str
    """for people: "cuda int4", "int4", "reference" ..."""
    num_bytes: int
    """of the weight as the kernel holds it"""
    reason: str | None = None
    """why it is a slow one; None where it is not"""
    orders_outputs: bool = False
    """whether it keeps gate and up in the order in which down wants its inputs"""

    def __str__(self) -> str:
        return self.kind if self.reason is None else f"{self.kind}: {self.reason}"


@dataclass(frozen=True)
class Role:
    """What a Linear is to its neighbours, as far as that decides how its weight is stored. A device may ignore it."""

    sorted_by_producer: bool = False
    """whoever makes its input applies act-order"""
    paired: bool = False
    """its halves are gate and up, whose outputs are multiplied"""
    half_order: Tensor | None = None
    """int [N / 2]: the order in which the outputs of either half are wanted; None: as they are"""
    head: bool = False
    """its outputs are logits"""


class PackError(UserError):
    """A kernel cannot hold a weight: its numbers are not what the format allows."""


class Backend(Protocol):
    device: torch.device
    dtype: torch.dtype
    """of activations"""
    head_dtype: torch.dtype
    """of an unquantized head, as far as it is not kept as stored"""

    def embedding_dtype(self, stored: torch.dtype, tied: bool) -> torch.dtype:
        """What an embedding of type `stored` is kept in; `tied`: it is the head as well."""

    def kernel(self, bits: int, in_features: int, out_features: int, group_size: int) -> KernelChoice:
        """From numbers alone, so that `inspect` can tell without weights. group_size -1: one group."""

    def reading(self, checkpoint: Checkpoint) -> AbstractContextManager[Checkpoint]:
        """The checkpoint as it is read for this device, as long as the block lasts."""

    def kept(self, name: str) -> Linear | None:
        """The quantized Linear of that name, where an earlier start made it of the same checkpoint: its tensors need
        not be read."""

    def quantized(self, tensors: GPTQTensors, role: Role, name: str = "") -> Linear:
        """`name`: under which it may be `kept`. PackError for tensors that the kernel it chose cannot hold."""

    def fed_by(self, gate_up: Linear, down: Linear) -> Linear:
        """`down` behind a gate_up that was asked to write its halves in down's order: need it still gather?"""

    def dense(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """weight [N, K], bias [N], of any float type and on any device."""

    def head(self, weight: Tensor, *, tied: bool = False) -> Linear:
        """weight [V, H]; `tied`: it is the embedding's memory."""

    def head_kernel(self, size: int, width: int, *, tied: bool) -> KernelChoice:
        """What `head` would make of a weight [V, H]; 0 bytes where that is the embedding's memory."""
