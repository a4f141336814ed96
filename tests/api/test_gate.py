"""Who goes through the gate, and in which order."""

from __future__ import annotations

import asyncio

import pytest

from gptq_api.api.gate import Gate


class Crowd:
    """Tasks at a gate, by their names; one inside stays until it is let go."""

    def __init__(self, width: int) -> None:
        self.gate = Gate(width)
        self.entered: list[str] = []
        self.doors: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, *names: str) -> None:
        """An owner is a name's first letter."""
        for name in names:
            self.doors[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._pass(name))
        await asyncio.sleep(0)

    async def _pass(self, name: str) -> None:
        async with self.gate.through(name[0].encode()):
            self.entered.append(name)
            await self.doors[name].wait()

    async def let_go(self, *names: str) -> None:
        for name in names:
            self.doors[name].set()
        for _ in range(5):
            await asyncio.sleep(0)


async def test_each_owner_has_its_own_and_keeps_its_order() -> None:
    crowd = Crowd(2)
    await crowd.come(*(f"a{i}" for i in range(5)), "b0", "c0", "b1", "b2")
    assert crowd.entered == ["a0", "a1", "b0", "c0", "b1"]
    await crowd.let_go("a1")
    assert crowd.entered[-1] == "a2"
    await crowd.come("a5")
    await crowd.let_go("a0", "a2", "b0")
    assert sorted(crowd.entered[6:]) == ["a3", "a4", "b2"]
    await crowd.let_go(*crowd.doors)
    assert crowd.entered[-1] == "a5" and not crowd.gate._lanes
    assert all(task.done() for task in crowd.tasks.values())


@pytest.mark.parametrize("too_late", [False, True])
async def test_whoever_gives_up_leaves_its_turn_to_the_next(too_late: bool) -> None:
    crowd = Crowd(1)
    await crowd.come("a0", "a1", "a2")
    if too_late:
        crowd.doors["a0"].set()
        await asyncio.sleep(0)  # a0 leaves, and a1 has its turn without knowing it
    crowd.tasks["a1"].cancel()
    await crowd.let_go("a0")
    assert crowd.entered == ["a0", "a2"] and crowd.tasks["a1"].cancelled()
    await crowd.let_go("a2")
    assert not crowd.gate._lanes


async def test_whoever_gives_up_while_another_leaves_is_passed_over() -> None:
    crowd = Crowd(1)
    await crowd.come("a0", "a1", "a2")
    crowd.doors["a0"].set()
    crowd.tasks["a1"].cancel()  # a0 leaves first, and sees that a1 has gone
    await asyncio.wait([crowd.tasks["a0"], crowd.tasks["a1"]])
    assert crowd.tasks["a1"].cancelled()
    await crowd.let_go("a2")
    assert crowd.entered == ["a0", "a2"] and not crowd.gate._lanes


async def test_an_error_inside_is_no_stay() -> None:
    gate = Gate(1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            async with gate.through(b"a"):
                raise ZeroDivisionError
    assert not gate._lanes
