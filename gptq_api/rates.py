"""How often things happen, by a clock that the caller reads: time.monotonic() in the server, any number in a test."""

from __future__ import annotations

from collections import deque

MOST_DEPARTURES = 64
UNKNOWN_S = 1.0
"""What an interval is taken to be before anything is known of it"""
_ROUNDING = 1e-6
"""whoever comes when it was told to is not a fraction of a token early"""


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


class Bucket:
    """So much a minute, all of it at once where nothing was taken before."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        """What may be taken; below 0 where more was taken than there was."""
        self._level = min(self._level + (now - self._at) * self.per_minute / 60, float(self.per_minute))
        self._at = now
        return self._level

    def wait_s(self, num: float, now: float) -> float:
        """Until so much is there; for more than a minute's until all is there that can be."""
        lacking = min(num, self.per_minute) - self.level(now)
        return 0.0 if lacking < _ROUNDING else lacking * 60 / self.per_minute

    def full_s(self, now: float) -> float:
        """Until it is as if nothing had been taken."""
        return self.wait_s(self.per_minute, now)

    def take(self, num: float, now: float) -> None:
        self._level = self.level(now) - num

    def give_back(self, num: float, now: float) -> None:
        self._level = min(self.level(now) + num, float(self.per_minute))

    def change(self, per_minute: int, now: float) -> None:
        """What was taken stays taken."""
        level = self.level(now) + per_minute - self.per_minute
        self.per_minute = per_minute
        self._level = min(level, float(per_minute))
