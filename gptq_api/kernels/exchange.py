"""Ranks on GPUs of one host give each other the columns that each has computed (ext/exchange/exchange.cu).

Few rows go word by word, each word with the number of its round, so that nobody waits for a barrier or a fence; many
go straight into place behind one flag. Where GPUs cannot write each other's memory, words, flags and many rows go
through the host's, by the same kernels. All take part in programmatic dependent launch and may be captured into CUDA
graphs; every rank has to launch the same exchanges in the same order, each from a thread of its own. No multicast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_api.kernels import ops
from gptq_api.kernels.extension import cuda as _cuda

__all__ = ["Exchange", "Place", "peer_refusal"]

CAPACITY = 1 << 18
"""words of each rank that may go one by one"""
FEW = 1 << 16
"""up to so many do: with more, twice the bytes cost more than a fence"""
STAGE = 1 << 23
"""words of all ranks that go through the host's memory at a time, of many rows"""
LIMIT_S = 2.0
"""that a rank is waited for in a step that is a CUDA graph on all of them"""
PATIENT_LIMIT_S = 60.0
"""the same where kernels may still have to be compiled or loaded"""
_LIVE = 2
"""word of ExchangeState"""


def peer_refusal(devices: list[int]) -> str | None:
    """Why these GPUs cannot write each other's memory; None where they can."""
    for a in devices:
        for b in devices:
            if a != b and not torch.cuda.can_device_access_peer(a, b):
                return f"GPU {a} cannot write the memory of GPU {b} (no peer access between them)"
    return None


@dataclass(frozen=True)
class Place:
    """A matrix [rows, columns] that every rank has on its device, all of one type and stride."""

    own: Tensor
    addresses: list[int]
    """on each rank"""
    columns: list[range]
    """of each rank"""

    @property
    def words(self) -> list[int]:
        """The first word of each rank's columns, and the end of the last one's."""
        size = self.own.element_size()
        return [0, *(part.stop * size // 4 for part in self.columns)]


class Exchange:
    """One rank's side. The device is the current one of the thread, which makes it, connects it and launches."""

    def __init__(self, rank: int, size: int, each: Callable[[Any], list[Any]], through_host: bool = False) -> None:
        """`each`: gives what every rank has said, in order; all of them call it. `through_host`: as devices have to
        that cannot write each other's memory; without it, RuntimeError where one cannot."""
        self.rank, self.size, self._each = rank, size, each
        device = torch.cuda.current_device()

        def zeros(num: int, dtype: torch.dtype, on_host: bool) -> Tensor:
            where: dict[str, Any] = {"pin_memory": True} if on_host else {"device": device}
            return torch.zeros(num, dtype=dtype, **where)  # pinned, it has one address for the host and all devices

        self._state = zeros(_cuda.exchange_state_bytes // 4, torch.int32, False)
        self._stuck = zeros(1, torch.int32, True)
        self._words = zeros(2 * size * CAPACITY, torch.int64, through_host)
        self._arrived = zeros(_cuda.exchange_most_ranks, torch.int32, through_host)
        self._staged = zeros(2 * STAGE, torch.int32, True) if through_host and rank == 0 else None
        if not through_host:
            for peer in set(each(device)):
                _cuda.enable_peer_access(peer)
        torch.cuda.synchronize()
        self._buffers, self._flags = each(self._words.data_ptr()), each(self._arrived.data_ptr())
        self._stage: int = each(0 if self._staged is None else self._staged.data_ptr())[0]

    def place(self, matrix: Tensor, columns: list[range]) -> Place:
        """Every rank's `matrix` [rows, columns], of 16 or 32 bits, its rows side by side. All ranks call it."""
        if matrix.dim() != 2 or not matrix.is_contiguous() or matrix.shape[1] != columns[-1].stop:
            raise ValueError(
                f"matrix {list(matrix.shape)}, strides {matrix.stride()}; expected {columns[-1].stop} columns"
            )
        size = matrix.element_size()
        if size not in (2, 4) or any(part.start * size % 4 or part.stop * size % 4 for part in columns):
            raise ValueError(f"{matrix.dtype} in parts {columns}: not in whole words of 32 bits")
        return Place(matrix, self._each(matrix.data_ptr()), columns)

    def go_live(self) -> None:
        """From here on ranks wait for each other. Before, while each is warmed up by itself, nothing is exchanged."""
        # None captures a graph any more: where two share a device, no other may synchronize with it meanwhile.
        self._each(None)
        self._state[_LIVE] = 1
        torch.cuda.synchronize()
        self._each(None)

    def all_gather(self, place: Place, part: Tensor, index: Tensor | None = None) -> Tensor:
        """`part` [M, this rank's columns] of each rank -> the first M rows of the place, which are returned.

        `part` may be this rank's columns of it. `index`, int32 [columns], of 16-bit elements: where in its row each
        goes; None: in order. ValueError where there is an index and more rows than `takes_index` allows.
        """
        rows, mine, own = part.shape[0], place.columns[self.rank], place.own
        if part.shape[1] != len(mine) or part.dtype != own.dtype or part.stride(1) != 1 or rows > own.shape[0]:
            raise ValueError(
                f"part {list(part.shape)} {part.dtype}, strides {part.stride()}; expected up to {own.shape[0]} rows of "
                f"{len(mine)} {own.dtype}"
            )
        size, by_rows = own.element_size(), not self.takes_index(place, rows)
        if part.stride(0) * size % 4 or part.data_ptr() % 4:
            raise ValueError(f"part of strides {part.stride()}: its rows do not begin at whole words")
        if index is not None and (by_rows or index.dtype != torch.int32 or tuple(index.shape) != (own.shape[1],)):
            raise ValueError(f"index {list(index.shape)} {index.dtype} with {rows} rows of {own.shape[1]} columns")
        lds, ldf = part.stride(0) * size // 4, own.stride(0) * size // 4
        at_a_time = max(1, STAGE // ldf if by_rows and self._stage else rows)
        for first in range(0, rows, at_a_time):
            with torch.cuda.device(own.device):
                _cuda.exchange(
                    *(part[first:].data_ptr(), [address + 4 * ldf * first for address in place.addresses]),
                    *(self._buffers, self._flags, self._stage, STAGE, self._state.data_ptr()),
                    *(0 if index is None else index.data_ptr(), self._stuck.data_ptr(), place.words),
                    *(self.rank, min(at_a_time, rows - first), lds, ldf, CAPACITY, by_rows, _limit_s()),
                    torch.cuda.current_stream(own.device).cuda_stream,
                )
        return own[:rows]

    def all_gather_norm(
        self, place: Place, rows: int, weight: Tensor, eps: float, out: Tensor, perm: Tensor | None = None
    ) -> Tensor:
        """`all_gather` of the first M rows, each rank's columns of which are in place, and `ops.rms_norm` of them into
        `out` [M, columns]: one kernel where `normalizes`, otherwise two."""
        own, x = place.own, place.own[:rows]
        part = place.columns[self.rank]
        if not self.normalizes(place, rows):
            self.all_gather(place, x[:, part.start : part.stop])
            return ops.rms_norm(x, weight, eps, out, perm)
        ops.check_norm(x, weight, out, perm)
        if rows:
            with torch.cuda.device(own.device):
                _cuda.exchange_norm(
                    *(place.addresses, self._buffers, self._state.data_ptr(), self._stuck.data_ptr(), place.words),
                    *(self.rank, CAPACITY, _limit_s(), weight.data_ptr(), 0 if perm is None else perm.data_ptr()),
                    *(out.data_ptr(), rows, own.shape[1], own.stride(0), out.stride(0), eps),
                    own.dtype == torch.bfloat16,
                    torch.cuda.current_stream(own.device).cuda_stream,
                )
        return out

    def normalizes(self, place: Place, rows: int) -> bool:
        """Whether one kernel exchanges so many rows and normalizes them."""
        aligned = all(part.start % 8 == 0 for part in place.columns) and all(place.columns)
        return aligned and rows * max(len(part) for part in place.columns) // 2 <= CAPACITY

    def takes_index(self, place: Place, rows: int) -> bool:
        """Whether so many rows go word by word."""
        size = place.own.element_size()
        return rows * max(len(part) for part in place.columns) * size // 4 <= FEW

    def who_is_missing(self) -> int | None:
        """The rank that this one has waited for in vain, after which its device does nothing any more."""
        return int(self._stuck[0]) - 1 if int(self._stuck[0]) else None


def _limit_s() -> float:
    return LIMIT_S if torch.cuda.is_current_stream_capturing() else PATIENT_LIMIT_S
