"""Whose input is parsed next.

h11 takes 35 us for 2 KiB of a plain body, and 3 ms where they come as chunks of one byte. So input is parsed in slices,
and all connections together have two milliseconds of each turn of the event loop for them, however many they are.
What begins a request is parsed as it comes, and does not wait behind bodies, as long as not much time goes into that.
"""

from __future__ import annotations

import asyncio
from collections import deque
from time import perf_counter
from typing import Protocol

BUDGET_S = 0.002
"""seconds of one turn of the loop"""
MOST_SLICES = 3
"""of one connection in one turn of the loop, besides one that is parsed as it comes"""
SHARE = 0.3
"""of the time that may go into what is parsed as it comes"""


class Parsing(Protocol):
    def take_turn(self) -> bool:
        """Parse a slice. Whether there is another one to parse now."""


class Turns:
    def __init__(self) -> None:
        self._queue: deque[Parsing] = deque()
        self._running: asyncio.Handle | None = None
        self._credit = BUDGET_S
        self._credit_at = perf_counter()

    def has_time(self, *, in_body: bool) -> bool:
        """Whether a slice may be parsed as it comes. What it takes is told to `spent`."""
        now = perf_counter()
        self._credit = min(BUDGET_S, self._credit + (now - self._credit_at) * SHARE)
        self._credit_at = now
        return self._credit > 0 and not (in_body and self._queue)

    def spent(self) -> None:
        """The time since `has_time` was asked."""
        self._credit -= perf_counter() - self._credit_at

    def join(self, connection: Parsing) -> None:
        """Who is not in the queue yet goes to its end."""
        self._queue.append(connection)
        if self._running is None:
            self._running = asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        until, queue = perf_counter() + BUDGET_S, self._queue
        try:
            for _ in range(MOST_SLICES * len(queue)):
                if not queue or perf_counter() >= until:
                    break
                connection = queue.popleft()
                if connection.take_turn():
                    queue.append(connection)
        finally:
            self._running = asyncio.get_running_loop().call_soon(self._run) if queue else None
