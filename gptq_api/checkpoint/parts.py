"""Some of a tensor, such as what one rank keeps of it: which part that is, and where its bytes are in a file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_GAP = 32 * 2**10
"""Bytes that are read and dropped sooner than that a read begins anew behind them. A read of its own takes 3 us,
however many threads read, since Python runs one of them at a time; in that time two cores copy some 32 KiB out of the
page cache (docs/kernels.md), and more cores more."""
_ROW = 2**20
"""bytes of a row that is worth reading whole"""


@dataclass(frozen=True)
class TensorPart:
    """Ranges of one dimension, one behind another."""

    dim: int
    ranges: tuple[range, ...]

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        return (*whole[: self.dim], sum(map(len, self.ranges)), *whole[self.dim + 1 :])

    def of(self, tensor: Tensor) -> Tensor:
        """A view where it is one range."""
        found = [tensor.narrow(self.dim, each.start, len(each)) for each in self.ranges]
        return found[0] if len(found) == 1 else torch.cat(found, self.dim)


@dataclass(frozen=True)
class Region:
    """Bytes of a file: of each of `rows` rows, which begin `stride` apart from `begin` on, the same `runs`."""

    begin: int
    stride: int
    rows: int
    runs: tuple[tuple[int, int], ...]
    """(where in a row, length)"""

    @classmethod
    def of(cls, begin: int, shape: tuple[int, ...], item_size: int, part: TensorPart | None) -> Region:
        """Of a tensor whose data is at `begin`, or of a part of it, in the order of its elements."""
        if part is None:
            size = math.prod(shape) * item_size
            return cls(begin, size, 1, ((0, size),))
        inner = math.prod(shape[part.dim + 1 :]) * item_size
        runs = tuple((each.start * inner, len(each) * inner) for each in part.ranges if each)
        return cls(begin, shape[part.dim] * inner, math.prod(shape[: part.dim]), runs)

    @property
    def row_bytes(self) -> int:
        return sum(length for _, length in self.runs)

    @property
    def num_bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def reads_through(self) -> bool:
        """Whether whole rows are read and what lies between the runs is dropped."""
        dropped = self.stride - self.row_bytes
        return self.rows > 1 and self.stride <= _ROW and dropped < _GAP * len(self.runs)

    def piece(self, most: int) -> int:
        """How many of its bytes are best read at a time, at most `most`: whole rows where they are no larger."""
        return most // self.row_bytes * self.row_bytes if 0 < self.row_bytes <= most else most

    def runs_from(self, at: int, length: int) -> Iterator[tuple[int, int]]:
        """(position in the file, length) of each run of its bytes from `at` on."""
        row, inside = divmod(at, self.row_bytes)
        start = self.begin + row * self.stride
        while length:
            for where, size in self.runs:
                count = min(size - inside, length)
                if count > 0:
                    yield start + where + inside, count
                    length -= count
                inside = max(0, inside - size)
            start += self.stride
