"""A narrow gate before the work that admission costs, one for each owner: hundreds of requests that come at once stand
before their owner's, and whoever comes after them goes through another."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class _Lane:
    num_inside: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)


class Gate:
    def __init__(self, width: int) -> None:
        """`width`: of each owner, so many are inside at a time."""
        self._width = width
        self._lanes: dict[bytes, _Lane] = {}

    @asynccontextmanager
    async def through(self, owner: bytes) -> AsyncIterator[None]:
        """Inside the block is inside the gate; the owner's own go through in the order of their coming."""
        lane = self._lanes.setdefault(owner, _Lane())
        if lane.num_inside < self._width:
            lane.num_inside += 1
        else:
            await self._turn(owner, lane)
        try:
            yield
        finally:
            self._leave(owner, lane)

    async def _turn(self, owner: bytes, lane: _Lane) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        lane.waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with suppress(ValueError):  # somebody who left at the same moment has passed it over
                    lane.waiting.remove(turn)
            else:
                self._leave(owner, lane)  # the turn came at the same moment: it is the next one's
            raise

    def _leave(self, owner: bytes, lane: _Lane) -> None:
        while lane.waiting:
            turn = lane.waiting[0]
            if not turn.done():
                lane.waiting.popleft()
                turn.set_result(None)  # its place inside is handed on
                return
            lane.waiting.popleft()
        lane.num_inside -= 1
        if not lane.num_inside:
            del self._lanes[owner]
