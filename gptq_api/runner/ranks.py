"""Ranks: threads of one process that load a model's shards and step them together, one device each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from gptq_api.model.shard import Shard

T = TypeVar("T")

STALL_S = 120.0
"""A rank that has not come to a meeting for so long has stopped. On the CPU it computes in between; what waits on GPUs
has limits of its own (kernels/exchange.py)."""


class RankError(RuntimeError):
    """A rank has stopped, or ranks differ in what they computed: nothing that they hold can be used any longer."""


class Rank:
    """One of them, as its own thread sees it."""

    def __init__(self, group: RankGroup, rank: int) -> None:
        self.shard, self._group = Shard(rank, group.size), group

    def all_gather(self, part: Tensor) -> Tensor:
        """[..., N of each rank] in host memory -> [..., N of all], in the order of the ranks. Every rank calls it."""
        return torch.cat(self._group.exchange(self.shard.rank, part), -1)

    def each(self, value: T) -> list[T]:
        """What each rank has said, in their order."""
        return self._group.exchange(self.shard.rank, value)

    def meet(self) -> None:
        """Wait until all have come here."""
        self.each(None)


class RankGroup:
    """`run` has every rank do something. Rank 0 is the caller's thread, so that what belongs to the thread that loads a
    model (its device, torch's settings) is that of the runner's caller."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.ranks = [Rank(self, rank) for rank in range(size)]
        self._said: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=STALL_S)
        self._threads = [ThreadPoolExecutor(1, f"rank-{rank}") for rank in range(1, size)]
        self._reason: BaseException | None = None
        """why the ranks no longer meet"""

    def run(self, work: Callable[[int], T]) -> list[T]:
        """work(rank) on every rank's thread, all at once -> what each returned. The first error is raised when all have
        ended; who waits for a rank that failed is woken, and nothing can be run any more."""
        if self._reason is not None:
            raise RankError(f"a rank stopped before: {self._reason}")
        futures: list[Future[T]] = [
            thread.submit(self._guarded, work, rank) for rank, thread in enumerate(self._threads, 1)
        ]
        errors, results = list[BaseException](), list[T]()
        try:
            results.append(self._guarded(work, 0))
        except BaseException as error:
            errors.append(error)
        for future in futures:
            failed = future.exception()
            if failed is None:
                results.append(future.result())
            else:
                errors.append(failed)
        if errors:
            woken = (RankError, threading.BrokenBarrierError)
            self._reason = next((error for error in errors if not isinstance(error, woken)), errors[0])
            raise self._reason
        return results

    def exchange(self, rank: int, value: T) -> list[T]:
        self._said[rank] = value
        self._wait()
        said = list(self._said)
        self._wait()
        return said

    def _wait(self) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise RankError(
                f"another rank failed, or has not come for {STALL_S:.0f} s; the model cannot be stepped any more"
            ) from None

    def _guarded(self, work: Callable[[int], T], rank: int) -> T:
        try:
            return work(rank)
        except BaseException:
            self._barrier.abort()
            raise
