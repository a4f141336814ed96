"""Sequences that nobody waits for: they have what the others leave, and give way at once."""

from __future__ import annotations

from gptq_api.types import BACKGROUND
from tests.scheduler.test_shares import World


def test_a_newcomer_gets_the_only_seat_and_the_background_goes_on_behind_it() -> None:
    world = World(max_num_seqs=1)
    lines = world.add(b"batch", 3, max_tokens=20, level=BACKGROUND)
    world.step(5)
    (chat,) = world.add(b"chat", max_tokens=4)
    world.drain()
    assert world.finished == [chat, *lines] and world.preemptions == 1


def test_all_seats_are_theirs_as_they_come_whoever_owns_the_background() -> None:
    world = World(max_num_seqs=4)
    lines = world.add(b"one", 20, level=BACKGROUND) + world.add(b"other", 20, level=BACKGROUND + 5)
    world.step(5)
    chats = world.add(b"chat", 4, max_tokens=8) + world.add(b"one", 2, max_tokens=8)
    world.step(6)
    assert {seq.sequence_id for seq in world.scheduler.running} <= set(chats)
    world.drain()
    assert set(world.finished[: len(chats)]) == set(chats) and set(world.finished) == {*chats, *lines}


def test_blocks_are_theirs_as_well() -> None:
    world = World(max_num_seqs=64, num_blocks=100)
    world.add(b"batch", 30, prompt=16, max_tokens=100, level=BACKGROUND)
    world.step(10)
    (chat,) = world.add(b"chat", prompt=300, max_tokens=4)  # beyond any share
    world.drain()
    assert world.finished[0] == chat


def test_a_prompt_is_computed_before_those_of_the_background() -> None:
    world = World(max_num_seqs=64, budget=16)
    world.add(b"batch", 8, prompt=200, max_tokens=4, level=BACKGROUND)
    world.step(3)
    (chat,) = world.add(b"chat", prompt=40, max_tokens=4)
    world.drain()
    assert world.first_tokens[0] == chat and world.finished[0] == chat


def test_in_a_shared_step_those_that_decode_come_first() -> None:
    world = World(max_num_seqs=64, shared_rows=4)
    lines = world.add(b"batch", 30, max_tokens=50, level=BACKGROUND)
    world.step(3)
    chats = world.add(b"chat", 4, max_tokens=20)
    world.drain()
    assert set(world.finished[:4]) == set(chats)
    assert set(world.finished[4:]) == set(lines)


def test_the_background_does_not_drive_itself_out() -> None:
    world = World(max_num_seqs=2)
    world.add(b"one", 4, level=BACKGROUND + 5)
    world.step(3)
    world.add(b"one", 4, level=BACKGROUND)
    world.drain()
    assert world.preemptions == 0
