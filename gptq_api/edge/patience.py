"""How long a client has been waited for: the time in which the event loop went round, and not that in which this
process had no processor, was stopped, or was busy with something else. What a client sends then nobody reads, and what
it does not send it may not be able to, since what its connection holds is full."""

from __future__ import annotations

import asyncio

TICK_S = 0.2
"""between two looks at the clock"""
MOST_S = 0.3
"""that count between two looks: one that comes a little late is no sign of anything"""


class Patience:
    """A clock of seconds, which runs between the first `begin` and the last `end`."""

    def __init__(self) -> None:
        self._num_waits = 0
        self._counted = self._looked_at = 0.0
        self._tick: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Somebody is waited for."""
        self._num_waits += 1
        if self._tick is None:
            loop = asyncio.get_running_loop()
            self._looked_at = loop.time()
            self._tick = loop.call_later(TICK_S, self._look)

    def end(self) -> None:
        """Once for each `begin`."""
        self._num_waits -= 1
        if not self._num_waits and self._tick is not None:
            self._counted = self.now()
            self._tick.cancel()
            self._tick = None

    def now(self) -> float:
        """Seconds from an unknown beginning."""
        if self._tick is None:
            return self._counted
        return self._counted + min(asyncio.get_running_loop().time() - self._looked_at, MOST_S)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._counted, self._looked_at = self.now(), loop.time()
        self._tick = loop.call_later(TICK_S, self._look)
