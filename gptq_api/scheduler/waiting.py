"""Who waits for a seat, and whose turn it is.

Sequences belong to owners (an API key, an address): within an owner the lowest rank goes first, which among equal
priorities is the one that came first. Between owners the one goes first whose next sequence has the lowest level; of
several the one with the fewest seats; of those the one that has waited longest since it got a seat, or came.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter

from gptq_api.scheduler.sequence import Sequence

rank = attrgetter("rank")


@dataclass(slots=True, eq=False)
class _Line:
    turn: int
    """when it last got a seat, or came"""
    waiting: list[Sequence] = field(default_factory=list)
    """by rank"""
    num_seats: int = 0


class WaitingQueue:
    """Each operation takes the time of one look into a sorted list, however many wait."""

    def __init__(self) -> None:
        self._owners: dict[bytes, _Line] = {}
        self._order: list[tuple[int, int, int, bytes]] = []  # of those who wait: level, seats, turn, owner
        self._num_turns = 0
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """By rank, whoever owns them."""
        return iter(sorted(chain.from_iterable(owner.waiting for owner in self._owners.values()), key=rank))

    @property
    def num_owners(self) -> int:
        """Of sequences that wait or have a seat."""
        return len(self._owners)

    def first(self) -> Sequence | None:
        """Whose turn it is."""
        return self._owners[self._order[0][-1]].waiting[0] if self._order else None

    def add(self, seq: Sequence) -> None:
        owner = self._owners.get(seq.owner)
        if owner is None:
            owner = self._owners[seq.owner] = _Line(self._next_turn())
        self._leave_order(seq.owner, owner)
        insort(owner.waiting, seq, key=rank)
        self._num_waiting += 1
        self._enter_order(seq.owner, owner)

    def remove(self, seq: Sequence) -> None:
        """It waits no longer, and gets no seat."""
        owner = self._owners[seq.owner]
        self._leave_order(seq.owner, owner)
        owner.waiting.remove(seq)
        self._num_waiting -= 1
        self._enter_order(seq.owner, owner)

    def take(self) -> Sequence:
        """Whoever is first gets a seat."""
        name = self._order.pop(0)[-1]
        owner = self._owners[name]
        seq = owner.waiting.pop(0)
        self._num_waiting -= 1
        owner.num_seats += 1
        owner.turn = self._next_turn()
        self._enter_order(name, owner)
        return seq

    def seat_returned(self, name: bytes) -> None:
        """One of the owner's sequences has left its seat; where it waits again it is added afterwards."""
        owner = self._owners[name]
        self._leave_order(name, owner)
        owner.num_seats -= 1
        self._enter_order(name, owner)

    def _next_turn(self) -> int:
        self._num_turns += 1
        return self._num_turns

    def _place(self, name: bytes, owner: _Line) -> tuple[int, int, int, bytes]:
        return owner.waiting[0].rank[0], owner.num_seats, owner.turn, name

    def _leave_order(self, name: bytes, owner: _Line) -> None:
        if owner.waiting:
            del self._order[bisect_left(self._order, self._place(name, owner))]

    def _enter_order(self, name: bytes, owner: _Line) -> None:
        if owner.waiting:
            insort(self._order, self._place(name, owner))
        elif not owner.num_seats:
            del self._owners[name]
