"""Places for requests, running and waiting, and what an owner may hold of them.

An owner may hold up to SHARE times as many places as are free. So one alone leaves an eighth of them to those who come,
several end up with equal parts and a rest that is nobody's, and each has something to begin with. Where no second
owner is possible the one may hold all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gptq_api.rates import Departures

SHARE = 7
"""the largest share, in places that are free"""
SHORTEST_WAIT_S, LONGEST_WAIT_S = 0.05, 60.0


class PlacesTaken(RuntimeError):
    """There is no place now. The text says which limit it is, and when to come again."""

    def __init__(self, message: str, retry_after_s: float, *, share: bool) -> None:
        super().__init__(f"{message}; try again in {retry_after_s:.3g} s")
        self.retry_after_s = retry_after_s
        self.share = share
        """whether others still get one"""


@dataclass(slots=True, eq=False)
class _Holding:
    num_held: int = 0
    num_coming: int = 0
    promised: float = -math.inf
    """when the last that was sent away may come again"""


@dataclass(slots=True, eq=False)
class Places:
    total: int
    shared: bool = False
    """whether there may be more than one owner"""
    clock: Callable[[], float] = time.monotonic
    num_held: int = 0
    """by all owners"""
    num_coming: int = 0
    """requests on their way from the socket to a place"""
    _owners: dict[bytes, _Holding] = field(default_factory=dict)  # who holds or comes
    _departures: Departures = field(default_factory=Departures)
    _promised: float = -math.inf

    @property
    def most(self) -> int:
        """What one owner can ever hold."""
        return max(1, self.total * SHARE // (SHARE + 1)) if self.shared else self.total

    def come(self, owner: bytes) -> None:
        """A request is on its way, and will `arrive`. Raises PlacesTaken where it would find no place even if it were
        small, so that a crowd at the door is refused before it costs anything."""
        known = self._owners.get(owner) or _Holding()
        self._check(known, 1, known.num_held + known.num_coming, self.num_held + self.num_coming)
        self._owners[owner] = known
        known.num_coming += 1
        self.num_coming += 1

    def arrive(self, owner: bytes) -> None:
        """The request has its places, or needs none."""
        self._owners[owner].num_coming -= 1
        self.num_coming -= 1
        self._forget(owner)

    def take(self, owner: bytes, num: int) -> None:
        """So many places, or PlacesTaken and none."""
        known = self._owners.get(owner) or _Holding()
        self._check(known, num, known.num_held, self.num_held)
        if not self.num_held:
            self._departures.begin(self.clock())
        self._owners[owner] = known
        known.num_held += num
        self.num_held += num

    def give_back(self, owner: bytes, num: int) -> None:
        self._owners[owner].num_held -= num
        self.num_held -= num
        self._departures.note(self.clock(), num)
        self._forget(owner)

    def _check(self, known: _Holding, num: int, num_own: int, num_all: int) -> None:
        num_left = self.total - num_all - num
        if num_left < 0:
            wait_s = self._wait_s(self._promised, -num_left)
            self._promised = self.clock() + wait_s
            raise PlacesTaken(f"{num_all} of {self.total} requests are running or waiting", wait_s, share=False)
        beyond = num_own + num - max(1, SHARE * num_left)
        if self.shared and beyond > 0:
            # with each of its own that leaves it holds one less, and one more is free
            part = max(num_own, 1) / max(num_all, 1)
            wait_s = self._wait_s(known.promised, math.ceil(beyond / (SHARE + 1)) / part)
            known.promised = self.clock() + wait_s
            raise PlacesTaken(
                f"{num_own} requests of yours are running or waiting, and what is free is kept for others",
                wait_s,
                share=True,
            )

    def _wait_s(self, promised: float, num: float) -> float:
        """Until `num` places are free, behind those who were sent away before."""
        now = self.clock()
        wait_s = max(promised - now, 0.0) + num * self._departures.interval_s(now)
        return min(max(wait_s, SHORTEST_WAIT_S), LONGEST_WAIT_S)

    def _forget(self, owner: bytes) -> None:
        known = self._owners[owner]
        if not known.num_held and not known.num_coming:
            del self._owners[owner]
