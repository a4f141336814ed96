"""Several owners on one scheduler: turns, seats, blocks and prompts."""

from __future__ import annotations

from collections import Counter

import pytest

from gptq_api.scheduler.blocks import BlockManager
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.step import Sampled, Step
from gptq_api.types import SamplingParams
from tests.support.work import lines_run


class World:
    """A scheduler whose sequences all run to max_tokens. Ids are numbers, and by them it knows the owners."""

    def __init__(
        self, max_num_seqs: int = 4, budget: int = 64, num_blocks: int = 400, shared_rows: int | None = None
    ) -> None:
        blocks = BlockManager(num_blocks, 4)
        self.scheduler = Scheduler(blocks, max_num_seqs, budget, shared_rows=shared_rows)
        self.owners: dict[int, bytes] = {}
        self.first_tokens: list[int] = []  # ids, in the order of their first tokens
        self.finished: list[int] = []

    def add(self, owner: bytes, num: int = 1, prompt: int = 3, max_tokens: int = 40, level: int = 0) -> list[int]:
        ids = list(range(len(self.owners), len(self.owners) + num))
        for i in ids:
            params = (SamplingParams(max_tokens=max_tokens),)
            assert self.scheduler.add(i, [1 + i] * prompt, params, owner=owner, level=level)
            self.owners[i] = owner
        return ids

    def step(self, num: int = 1) -> Step:
        for _ in range(num):
            step = self.scheduler.schedule()
            progress = self.scheduler.update(step, Sampled(step.num_sampled, [5] * sum(step.num_sampled)))
            self.first_tokens += [i for i in progress.sequence_ids if i not in self.first_tokens]
            self.finished += progress.finished
        return step

    def drain(self) -> None:
        for _ in range(10_000):
            if not self.scheduler.has_work():
                break
            self.step()
        assert sorted(self.finished) == sorted(self.owners) and not self.scheduler.waiting.num_owners

    @property
    def seats(self) -> Counter[bytes]:
        return Counter(seq.owner for seq in self.scheduler.running)

    @property
    def preemptions(self) -> int:
        return self.scheduler.counters.preemptions


def test_owners_take_turns_and_each_keeps_its_order() -> None:
    world = World(max_num_seqs=1)
    greedy = world.add(b"greedy", 4, max_tokens=2)
    modest = world.add(b"modest", 2, max_tokens=2)
    late = world.add(b"late", 1, max_tokens=2)
    world.drain()
    assert world.finished == [greedy[0], modest[0], late[0], greedy[1], modest[1], greedy[2], greedy[3]]
    assert world.preemptions == 0, "its only seat is everybody's share"


def test_a_newcomer_gets_a_seat_at_once_and_the_youngest_of_the_greedy_gives_way() -> None:
    world = World(max_num_seqs=8)
    greedy = world.add(b"greedy", 100)
    world.step(5)
    (other,) = world.add(b"other")
    world.step(2)
    assert other in world.first_tokens and world.preemptions == 1
    assert greedy[7] not in {seq.sequence_id for seq in world.scheduler.running}
    world.drain()


def test_shares_are_reached_and_nobody_is_driven_out_of_them() -> None:
    world = World(max_num_seqs=9)
    world.add(b"one", 50)
    world.step(3)
    world.add(b"two", 50)
    world.add(b"three", 1)
    world.step(8)
    assert world.seats == {b"one": 5, b"two": 3, b"three": 1}, "5 is nobody's loss: the others have their share"
    assert world.preemptions == 4
    world.step(20)
    assert world.preemptions == 4, "and so it stays"
    world.drain()


def test_more_owners_than_seats() -> None:
    world = World(max_num_seqs=2)
    world.add(b"greedy", 10, max_tokens=5)
    world.step()
    for i in range(5):
        world.add(b"%d" % i, 1, max_tokens=5)
    world.step()
    assert world.seats == {b"greedy": 1, b"0": 1} and world.preemptions == 1
    world.drain()
    assert world.finished[:7].count(6) == 0 and {world.owners[i] for i in world.finished[:7]} >= {b"0", b"1", b"2"}
    assert world.preemptions == 1


def test_blocks_are_shared_as_seats_are() -> None:
    world = World(max_num_seqs=64, num_blocks=100)
    world.add(b"greedy", 30, prompt=16, max_tokens=100)
    world.step(10)
    assert world.scheduler.waiting, "there are seats, but no blocks"
    before = world.preemptions
    (other,) = world.add(b"other", prompt=30, max_tokens=10)
    world.step(4)
    assert other in world.first_tokens and 0 < world.preemptions - before < 6
    world.step(10)
    assert other in world.finished, "whoever grows beyond its share pays with its own"
    world.drain()


def test_a_prompt_beyond_its_owners_share_of_blocks_drives_nobody_out() -> None:
    world = World(max_num_seqs=64, num_blocks=100)
    world.add(b"greedy", 8, prompt=40, max_tokens=8)
    world.step()
    world.add(b"other", prompt=300, max_tokens=1)
    world.step(6)
    assert world.preemptions == 0
    world.drain()


def test_two_that_do_not_fit_together_end_one_after_the_other() -> None:
    world = World(max_num_seqs=2, budget=8, num_blocks=10)
    world.add(b"one", prompt=32, max_tokens=8)
    world.add(b"two", prompt=32, max_tokens=8)
    world.drain()
    assert world.finished == [0, 1]


def test_a_short_prompt_goes_beside_the_chunks_of_another_owners() -> None:
    world = World(budget=32)
    (reader,) = world.add(b"reader", prompt=1000)
    world.step()
    (short,) = world.add(b"short", prompt=6)
    step = world.step()
    assert step.num_new == [26, 6] and world.first_tokens == [short]
    assert world.step().num_new == [1, 22], "all that a step has for prompts is the reader's again"
    assert reader not in world.first_tokens
    world.drain()


def test_long_prompts_of_two_owners_share_the_steps_and_a_third_of_one_of_them_waits() -> None:
    world = World(budget=32)
    world.add(b"one", 2, prompt=300)
    world.step()
    world.add(b"two", prompt=300)
    assert [world.step().num_new for _ in range(3)] == [[16, 16]] * 3
    world.drain()
    assert world.first_tokens == [0, 2, 1]


def test_whoever_decodes_loses_no_token_to_the_prompts_of_others() -> None:
    world = World(budget=16)
    world.add(b"one", prompt=500)
    world.step()
    (talker,) = world.add(b"two", prompt=4, max_tokens=30)
    world.step(31)
    assert talker in world.finished


def test_an_owner_that_is_more_urgent_is_not_driven_out_and_goes_first() -> None:
    world = World(max_num_seqs=2)
    world.add(b"urgent", 6, max_tokens=4)
    world.step()
    late = world.add(b"patient", 1, max_tokens=4, level=1)
    world.drain()
    assert world.preemptions == 0 and world.finished[-1] == late[0]


def test_rows_of_a_shared_step_are_few_and_taken_in_turn() -> None:
    world = World(max_num_seqs=64, budget=512, num_blocks=2000, shared_rows=8)
    greedy = world.add(b"greedy", 40, max_tokens=100)
    world.step()
    assert len(world.step().seats) == 40, "alone"
    modest = world.add(b"modest", 2, max_tokens=10)
    world.step()
    before = {seq.sequence_id: len(seq.token_ids) for seq in world.scheduler.running}
    for _ in range(9):
        assert len(world.step().seats) == 8
    assert set(modest) <= set(world.finished), "in every step"
    for _ in range(31):
        assert len(world.step().seats) == 8, "it is likely to come again"
    gained = [
        len(seq.token_ids) - before[seq.sequence_id] for seq in world.scheduler.running if seq.sequence_id in greedy
    ]
    assert sum(gained) == 9 * 6 + 31 * 8 and max(gained) - min(gained) <= 1
    world.drain()
    assert world.preemptions == 0


def test_owners_have_equal_parts_of_a_shared_step() -> None:
    world = World(max_num_seqs=64, budget=512, num_blocks=2000, shared_rows=8)
    for owner, num in ((b"one", 20), (b"two", 20), (b"three", 1)):
        world.add(owner, num, max_tokens=100)
    while world.scheduler.waiting:
        world.step()
    rows = Counter[bytes]()
    by_seat = {seq.seat: seq.owner for seq in world.scheduler.running}
    for _ in range(4):
        rows.update(by_seat[seat] for seat in world.step().seats)
    assert rows == {b"one": 12, b"two": 16, b"three": 4} or rows == {b"one": 16, b"two": 12, b"three": 4}
    world.drain()


def test_more_owners_than_rows_of_a_shared_step() -> None:
    world = World(max_num_seqs=64, num_blocks=1000, shared_rows=2)
    for i in range(6):
        world.add(b"%d" % i, 2, max_tokens=5)
    world.drain()


def test_fewer_decode_beside_the_prompt_of_a_newcomer() -> None:
    world = World(max_num_seqs=64, budget=512, num_blocks=2000, shared_rows=8)
    world.add(b"greedy", 20)
    world.step()
    (other,) = world.add(b"other", prompt=10)
    assert world.step().num_new == [1, 1, 10] and world.first_tokens[-1] == other
    assert len(world.step().seats) == 8
    world.drain()


def test_prompts_of_a_shared_step_are_few() -> None:
    world = World(max_num_seqs=8, budget=512, num_blocks=2000, shared_rows=8)
    world.add(b"greedy", 8, prompt=600)
    assert world.step().num_tokens == 512
    world.add(b"modest", prompt=10)
    assert world.step().num_new == [22, 10]
    world.drain()


def test_aborting_whoever_waits_or_runs_leaves_nothing_of_an_owner() -> None:
    world = World(max_num_seqs=2)
    ids = world.add(b"one", 5) + world.add(b"two", 5)
    world.step(3)
    for i in ids[::-1]:
        world.scheduler.abort(i)
    assert not world.scheduler.has_work() and world.scheduler.waiting.num_owners == 0


@pytest.mark.parametrize("num_owners", [1, 8, 512])
def test_a_step_beside_a_full_queue_costs_little_however_many_own_it(num_owners: int) -> None:
    world = World(max_num_seqs=256, budget=4096, num_blocks=4096)
    for i in range(512):
        world.add(b"%d" % (i % num_owners), max_tokens=100)

    def step() -> None:
        world.scheduler.update(step := world.scheduler.schedule(), Sampled(step.num_sampled, [5] * len(step.seats)))

    lines = [lines_run(step) for _ in range(20)]
    assert max(lines) < 256 * 150, "some hundred for each that runs, as without a queue"
