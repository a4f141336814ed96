"""Whether the engine is silent over its work. A silent engine is ill only if it owes something: whatever it is sent it
answers, with a step or, coming to rest, with its state."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_LATE_S = 1.0
"""A look at the clock that comes so late says that this process was stopped as well (^Z, a paused container)"""


class SilenceWatch:
    """One timer is armed while something is owed; steps do not move it, it looks again when it fires."""

    def __init__(self, limit_s: Callable[[], float], too_long: Callable[[], None]) -> None:
        """`limit_s`: how long the engine may be silent. `too_long` is called once when it has been, until it speaks."""
        self._limit_s, self._too_long = limit_s, too_long
        self._owed_since: float | None = None  # when the engine last spoke, or was first spoken to; None: it is at rest
        self._timer: asyncio.TimerHandle | None = None

    @property
    def stalled(self) -> bool:
        owed_since = self._owed_since
        return owed_since is not None and time.monotonic() - owed_since >= self._limit_s()

    def spoken_to(self) -> None:
        if self._owed_since is None:
            self._owed(time.monotonic())

    def spoke(self, *, at_rest: bool) -> None:
        """Called with every step."""
        self._owed(None if at_rest else time.monotonic())

    def close(self) -> None:
        """Nobody is there to owe anything."""
        self._owed_since = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _owed(self, since: float | None) -> None:
        self._owed_since = since
        if since is not None and self._timer is None:
            due = since + self._limit_s()
            self._timer = asyncio.get_running_loop().call_at(due, self._look, due)

    def _look(self, due: float) -> None:
        self._timer = None
        if self._owed_since is None:
            return
        now = time.monotonic()
        if now - due > _LATE_S:
            self._owed(now)  # the engine gets its time once more
        elif self.stalled:
            self._too_long()
        else:
            self._owed(self._owed_since)
