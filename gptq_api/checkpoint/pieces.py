"""Bytes that several threads work on at a time."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_MOST_THREADS = 8
_PIECES_ALONE = 2


def in_pieces(data: memoryview, size: int, work: Callable[[int, memoryview], T]) -> list[T]:
    """What `work(begin, data[begin : begin + size])` gives for each piece, in order; several at a time where there are
    many."""
    begins = range(0, len(data), size)
    if len(begins) <= _PIECES_ALONE:
        return [work(begin, data[begin : begin + size]) for begin in begins]
    pieces = [_threads().submit(work, begin, data[begin : begin + size]) for begin in begins]
    return [piece.result() for piece in pieces]


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """A core copies several GB/s out of the page cache."""
    return ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0))), "gptq-api-read")
