"""Request bodies on their way: what they hold together is bounded, and what is unfinished can be cut off.

A client that is slow, or has stopped, holds what it has sent for as long as its deadline lets it. So the bytes of all
bodies are counted, and where a body finds no room, those that have not grown for a while make it. Small bodies have
as much room again: what is short is not refused because of what is long. Where there are several owners, one may hold
up to SHARE times what is left, so that nobody's bodies keep all others out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from gptq_api.edge.patience import Patience

SMALL = 64 * 1024
"""bytes up to which a body costs so little that nobody asks first"""
SHARE = 7
"""as of places (engine/places.py): one owner alone leaves an eighth to others"""
STALLED_S = 2.0
"""seconds without growth after which a body makes room for others"""

Error = Callable[[], Exception]


class NoRoomError(Exception):
    """Bodies hold as much as they may."""


class Bodies:
    def __init__(self, most: int, stalled: Error) -> None:
        """`most`: bytes that they may hold together; `stalled`: what a body is cut off with that makes room."""
        self.most = most
        self.num_bytes = 0
        self.turn = asyncio.Lock()
        """for what occupies the event loop with a large body: one at a time"""
        self.patience = Patience()
        """runs while there are any"""
        self._stalled = stalled
        self._unfinished: dict[Arriving, None] = {}
        self._owned: dict[bytes, int] = {}  # bytes, by owner

    def cut(self, error: Error) -> None:
        """Whoever waits for the rest of a body gets the error now."""
        for body in list(self._unfinished):
            body.cut(error())

    def room_for(self, size: int) -> bool:
        """Whether a body may grow by so much, or could by others' leaving."""
        return self.num_bytes + size <= self.most or self._idle_bytes() >= self.num_bytes + size - self.most

    def _idle_bytes(self) -> int:
        since = self.patience.now() - STALLED_S
        return sum(body.size for body in self._unfinished if body.grown_at < since)

    def _make_room(self, size: int) -> None:
        since = self.patience.now() - STALLED_S
        for body in [body for body in self._unfinished if body.size and body.grown_at < since]:
            if self.num_bytes + size <= self.most:
                return
            body.cut(self._stalled())

    def _take(self, size: int, most: int, owner: bytes | None) -> None:
        if self.num_bytes + size > most:
            self._make_room(size)
        left = most - self.num_bytes - size
        if left < 0 or (owner is not None and self._owned.get(owner, 0) + size > max(SHARE * left, SMALL)):
            raise NoRoomError
        self._add(size, owner)

    def _add(self, size: int, owner: bytes | None) -> None:
        self.num_bytes += size
        if owner is not None:
            self._owned[owner] = self._owned.get(owner, 0) + size
            if not self._owned[owner]:
                del self._owned[owner]


class Arriving:
    """`with Arriving(bodies) as body:` around the reading of one body and its parsing. At its end the error is raised
    that the body was cut off with."""

    def __init__(self, bodies: Bodies, owner: bytes | None = None) -> None:
        """`owner`: who shares the room with whom; None: nobody else may come."""
        self.size = 0
        self._owner = owner
        self._bodies = bodies
        self.grown_at = bodies.patience.now()
        self._error: Exception | None = None

    def __enter__(self) -> Arriving:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._bodies._unfinished[self] = None
        self._bodies.patience.begin()
        return self

    def grow(self, size: int) -> None:
        """Raises NoRoomError."""
        bodies = self._bodies
        bodies._take(size, bodies.most if self.size + size > SMALL else 2 * bodies.most, self._owner)
        self.size += size
        self.grown_at = bodies.patience.now()

    def finish(self) -> None:
        """All of it is here: it is not cut off any more."""
        if self in self._bodies._unfinished:
            del self._bodies._unfinished[self]
            self._bodies.patience.end()

    def cut(self, error: Exception) -> None:
        """Its room is free at once; whoever reads it is woken up."""
        self._error = error
        self._release()
        self._task.cancel()

    def _release(self) -> None:
        self.finish()
        self._bodies._add(-self.size, self._owner)
        self.size = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()
        # as asyncio.timeout does: what others have cancelled stays cancelled
        if self._error is not None and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise self._error from None
