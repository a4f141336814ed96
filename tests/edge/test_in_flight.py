"""Bodies on their way: their bytes are bounded, and those that are unfinished can be cut off."""

from __future__ import annotations

import asyncio

import pytest

from gptq_api.edge import in_flight
from gptq_api.edge.in_flight import SMALL, Arriving, Bodies, NoRoomError


class StalledError(Exception): ...


class LeavingError(Exception): ...


@pytest.fixture
def bodies() -> Bodies:
    return Bodies(4 * SMALL, StalledError)


async def hold(bodies: Bodies, size: int, done: asyncio.Event, owner: bytes | None = None) -> None:
    with Arriving(bodies, owner) as body:
        body.grow(size)
        await done.wait()
        body.finish()


async def begun(bodies: Bodies, *sizes: int) -> tuple[list[asyncio.Task[None]], asyncio.Event]:
    done = asyncio.Event()
    tasks = [asyncio.create_task(hold(bodies, size, done)) for size in sizes]
    await asyncio.sleep(0)
    return tasks, done


async def test_all_together_hold_so_much_and_small_ones_as_much_again(bodies: Bodies) -> None:
    tasks, done = await begun(bodies, 3 * SMALL, SMALL)
    assert not bodies.room_for(1) and bodies.num_bytes == 4 * SMALL
    with Arriving(bodies) as large, pytest.raises(NoRoomError):
        large.grow(SMALL + 1)
    with Arriving(bodies) as small:
        small.grow(SMALL)
        with pytest.raises(NoRoomError):
            small.grow(1)
    for _ in range(3):
        tasks += (await begun(bodies, SMALL))[0]
    with Arriving(bodies) as small:
        small.grow(SMALL)
        with Arriving(bodies) as late, pytest.raises(NoRoomError):
            late.grow(1)
    done.set()
    for task in tasks[2:]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert bodies.num_bytes == 0 and bodies.room_for(4 * SMALL)


async def test_one_owner_leaves_room_to_others() -> None:
    bodies, done = Bodies(16 * SMALL, StalledError), asyncio.Event()
    tasks = [asyncio.create_task(hold(bodies, 7 * SMALL, done, b"greedy")) for _ in range(2)]
    await asyncio.sleep(0)
    for owner, size, is_room in (
        (b"greedy", SMALL + 1, False),
        (b"greedy", SMALL, True),
        (b"other", SMALL + 1, True),
        (b"other", 2 * SMALL + 1, False),
    ):
        with Arriving(bodies, owner) as body:
            if is_room:
                body.grow(size)
            else:
                with pytest.raises(NoRoomError):
                    body.grow(size)
    done.set()
    await asyncio.gather(*tasks)
    assert bodies.num_bytes == 0 and not bodies._owned


async def test_those_that_have_stopped_make_room(bodies: Bodies, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, done = await begun(bodies, 2 * SMALL, 2 * SMALL)
    assert not bodies.room_for(SMALL)
    monkeypatch.setattr(in_flight, "STALLED_S", -1.0)
    assert bodies.room_for(SMALL)
    with Arriving(bodies) as body:
        body.grow(SMALL + 1)
        assert bodies.num_bytes == 3 * SMALL + 1, "one was enough"
        with pytest.raises(StalledError):
            await tasks[0]
        done.set()
        await tasks[1]
    assert bodies.num_bytes == 0


async def test_the_unfinished_are_cut_off_and_nobody_else(bodies: Bodies) -> None:
    tasks, _ = await begun(bodies, 10, 20)

    async def finished() -> str:
        with Arriving(bodies) as body:
            body.grow(5)
            body.finish()
            await asyncio.sleep(0.05)
        return "whole"

    whole = asyncio.create_task(finished())
    await asyncio.sleep(0)
    bodies.cut(LeavingError)
    assert bodies.num_bytes == 5
    found = await asyncio.gather(*tasks, whole, return_exceptions=True)
    assert [type(item) for item in found] == [LeavingError, LeavingError, str]


async def test_a_cancelled_reader_stays_cancelled(bodies: Bodies) -> None:
    (task,), _ = await begun(bodies, 10)
    task.cancel()
    bodies.cut(LeavingError)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bodies.num_bytes == 0
