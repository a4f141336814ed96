"""How often things happen, by a clock that the caller reads: time.monotonic() in the server, any number in a test."""

from __future__ import annotations

from collections import deque

MOST_DEPARTURES = 64
UNKNOWN_S = 1.0
"""What an interval is taken to be before anything is known of it"""


class Departures:
    """How long it takes until the next one leaves, measured on those who left lately."""

    def __init__(self) -> None:
        self._times = deque[float](maxlen=MOST_DEPARTURES)
        self._since: float | None = None

    def begin(self, now: float) -> None:
        """From here on there is somebody who may leave: time before that, when nobody was there, says nothing."""
        self._since = now
        self._times.clear()

    def note(self, now: float, num: int) -> None:
        """So many have left."""
        self._times.extend([now] * num)

    def interval_s(self, now: float) -> float:
        """Seconds between two departures; before the first, as long as it has been waited for so far."""
        if self._since is None:
            return UNKNOWN_S
        if not self._times:
            return max(now - self._since, UNKNOWN_S)
        began = self._times[0] if len(self._times) == MOST_DEPARTURES else self._since
        return (now - began) / len(self._times)
