"""Who may hold how many places, and when the others may come again: with a given clock."""

from __future__ import annotations

import pytest

from gptq_api.engine.places import Places, PlacesTaken

ONE, TWO, THREE = b"one", b"two", b"three"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def fill(places: Places, owner: bytes) -> int:
    """Takes one place after the other, as long as there are any."""
    num = 0
    while True:
        try:
            places.take(owner, 1)
        except PlacesTaken:
            return num
        num += 1


def refusal(places: Places, owner: bytes, num: int = 1) -> PlacesTaken:
    with pytest.raises(PlacesTaken) as caught:
        places.take(owner, num)
    return caught.value


def test_the_only_possible_owner_may_hold_all() -> None:
    places = Places(16)
    assert places.most == 16 and fill(places, ONE) == 16
    assert not refusal(places, ONE).share


def test_one_of_several_leaves_places_to_those_who_come() -> None:
    places = Places(512, shared=True)
    assert fill(places, ONE) == places.most == 448
    taken = refusal(places, ONE)
    assert taken.share and "448 requests of yours" in str(taken)
    assert fill(places, TWO) == 56 and fill(places, THREE) == 7, "and then to those who come after them"
    places.give_back(ONE, 300)
    assert fill(places, TWO) == 256


def test_those_who_keep_coming_end_up_with_equal_parts() -> None:
    places = Places(512, shared=True)
    held = dict.fromkeys((ONE, TWO, THREE), 0)
    for turn in range(3000):
        for owner in held if turn > 100 else (ONE,):
            if held[owner]:
                places.give_back(owner, 1)
                held[owner] -= 1
            held[owner] += fill(places, owner)
    assert max(held.values()) - min(held.values()) <= 8 and min(held.values()) > 150


def test_the_last_place_is_for_whoever_holds_none() -> None:
    places = Places(2, shared=True)
    assert places.most == 1 and fill(places, ONE) == 1
    assert fill(places, TWO) == 1
    assert not refusal(places, THREE).share


def test_all_places_or_none() -> None:
    places = Places(8, shared=True)
    places.take(ONE, 3)
    assert refusal(places, ONE, 5).share and places.num_held == 3
    places.take(ONE, 4)
    assert not refusal(places, TWO, 2).share and places.num_held == 7


def test_a_crowd_at_the_door_counts() -> None:
    places = Places(8, shared=True)
    for _ in range(7):
        places.come(ONE)
    with pytest.raises(PlacesTaken) as caught:
        places.come(ONE)
    assert caught.value.share
    places.come(TWO)
    with pytest.raises(PlacesTaken) as caught:
        places.come(TWO)
    assert not caught.value.share
    places.take(ONE, 1)
    places.arrive(ONE)
    assert (places.num_held, places.num_coming) == (1, 7)
    places.give_back(ONE, 1)
    for _ in range(6):
        places.arrive(ONE)
    places.arrive(TWO)
    assert not places._owners, "nothing is kept of those who left"


def test_retry_after_is_the_time_until_a_place_is_free_and_one_after_the_other() -> None:
    clock = Clock()
    places = Places(10, clock=clock)
    places.take(ONE, 10)
    for _ in range(20):  # one leaves every 4 s
        clock.now += 4
        places.give_back(ONE, 1)
        places.take(ONE, 1)
    waits = [refusal(places, ONE).retry_after_s for _ in range(3)]
    assert waits == pytest.approx([4, 8, 12])
    assert "try again in 16 s" in str(refusal(places, ONE))
    clock.now += 16
    assert refusal(places, ONE).retry_after_s == pytest.approx(96 / 20), "promises are kept"


@pytest.mark.parametrize(("every_s", "wait_s"), [(0.2, 0.2), (0.001, 0.05), (1000, 60)])
def test_short_and_long_waits(every_s: float, wait_s: float) -> None:
    clock = Clock()
    places = Places(4, clock=clock)
    places.take(ONE, 4)
    for _ in range(100):
        clock.now += every_s
        places.give_back(ONE, 1)
        places.take(ONE, 1)
    assert refusal(places, ONE).retry_after_s == pytest.approx(wait_s, rel=0.05)


def test_nobody_has_left_yet() -> None:
    clock = Clock()
    places = Places(2, clock=clock)
    places.take(ONE, 1)
    clock.now += 3600  # an hour of one request at a time, and of nothing
    places.give_back(ONE, 1)
    clock.now += 3600
    places.take(ONE, 2)
    assert refusal(places, ONE).retry_after_s == 1
    clock.now += 7
    assert refusal(places, ONE).retry_after_s == 7, "as long again as it took so far"


def test_a_share_is_free_again_as_ones_own_leave() -> None:
    clock = Clock()
    places = Places(32, shared=True, clock=clock)
    places.take(ONE, 20)
    places.take(TWO, 4)
    for _ in range(10):  # of all one leaves every second, of the one's own 5 of 6
        clock.now += 1
        places.give_back(ONE, 1)
        places.take(ONE, 1)
    assert refusal(places, ONE, 6).retry_after_s == pytest.approx(2 * 24 / 20), "two fewer, and as many more are free"
