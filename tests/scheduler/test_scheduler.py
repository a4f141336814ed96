"""Random workloads against a model of the KV cache: the scheduler's promises, kept in every step."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptq_api.scheduler.blocks import BlockManager, block_hash
from gptq_api.scheduler.scheduler import Progress, Scheduler
from gptq_api.scheduler.sequence import Sequence
from gptq_api.step import Sampled, Step
from gptq_api.types import SamplingParams
from tests.support.work import lines_run

STOP = 0


def add(
    scheduler: Scheduler, sequence_id: int, prompt: list[int], max_tokens: int, salt: bytes = b"", owner: bytes = b""
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=(STOP,))
    assert scheduler.add(sequence_id, list(prompt), (params,), salt, owner=owner)
    return next(seq for seq in scheduler.waiting if seq.sequence_id == sequence_id)


def sampled(step: Step, token: int = 5) -> Sampled:
    """The same token for whoever is sampled from."""
    return Sampled(step.num_sampled, [token] * sum(step.num_sampled))


class World:
    """A scheduler, and a KV cache that remembers for every slot the exact prefix it was written for."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int, budget: int, caching: bool = True) -> None:
        self.blocks = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(self.blocks, max_num_seqs, budget, caching)
        self.kv: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self.tables: dict[int, list[int]] = {}  # by seat, as steps tell it

    def slot(self, seq: Sequence, position: int) -> int:
        size = self.blocks.block_size
        return seq.block_table[position // size] * size + position % size

    def check_ownership(self) -> None:
        scheduler, blocks = self.scheduler, self.blocks
        held = Counter(block_id for seq in scheduler.running for block_id in seq.block_table)
        for seq in scheduler.running:
            assert len(set(seq.block_table)) == len(seq.block_table), "a block twice in one table"
        for seq in scheduler.waiting:
            assert not seq.block_table, "a waiting sequence holds memory"
        assert len(held) + blocks.num_free == blocks.num_blocks, "owned + free = all"
        for block_id, owners in held.items():
            if owners > 1:  # shared: only as a full block that every owner has behind it
                for seq in scheduler.running:
                    if block_id in seq.block_table:
                        end = (seq.block_table.index(block_id) + 1) * blocks.block_size
                        assert end <= seq.num_computed_tokens, "a shared block that somebody still writes"

    def step(self, sample: random.Random) -> tuple[Step, dict[Sequence, str]]:
        scheduler = self.scheduler
        step = scheduler.schedule()
        assert step.seats, "work, but no progress"
        assert step.num_tokens <= scheduler.max_num_batched_tokens
        assert len(set(step.seats)) == len(step.seats) <= scheduler.max_num_seqs
        by_seat = {seq.seat: seq for seq in scheduler.running}
        for new in step.admitted:
            self.tables[new.seat] = []
            assert (new.token_ids, new.params) == (by_seat[new.seat].token_ids, by_seat[new.seat].params)
        for blocks in step.new_blocks:
            assert blocks.first == len(self.tables[blocks.seat])
            self.tables[blocks.seat] += blocks.block_ids
        sequences = [by_seat[seat] for seat in step.seats]
        assert [self.tables[seq.seat] for seq in sequences] == [seq.block_table for seq in sequences]
        spans = list(zip(sequences, step.num_computed, step.num_new, strict=True))
        for seq, start, n in spans:
            assert seq in scheduler.running and n >= 1
            for position in range(start, start + n):
                self.kv[self.slot(seq, position)] = (seq.cache_salt, tuple(seq.token_ids[: position + 1]))
        for seq, start, n in spans:  # after all writes: as a layer does
            assert seq.num_computed_tokens == start + n
            for position in range(start + n):
                expected = (seq.cache_salt, tuple(seq.token_ids[: position + 1]))
                assert self.kv.get(self.slot(seq, position)) == expected, "stale KV read"
        assert step.num_sampled == [int(start + n == len(seq.token_ids)) for seq, start, n in spans]
        tokens = [
            sample.choice([STOP, 1, 2, 3, 4, 5, -1 if sample.random() < 0.02 else 6])
            for _ in range(sum(step.num_sampled))
        ]
        progress = scheduler.update(step, Sampled(step.num_sampled, tokens))
        finished: dict[Sequence, str] = {
            seq: progress.finished[seq.sequence_id] for seq in sequences if seq.sequence_id in progress.finished
        }
        assert len(finished) == len(progress.finished)
        for seq in finished:
            assert not seq.block_table
        self.check_ownership()
        return step, finished


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(2, 40),
    block_size=st.sampled_from([1, 2, 4, 16]),
    max_num_seqs=st.integers(1, 8),
    budget=st.integers(1, 40),
    num_sequences=st.integers(1, 25),
    caching=st.booleans(),
)
@pytest.mark.slow
def test_random_workloads(
    seed: int, num_blocks: int, block_size: int, max_num_seqs: int, budget: int, num_sequences: int, caching: bool
) -> None:
    rng = random.Random(seed)
    world = World(num_blocks, block_size, max_num_seqs, budget, caching)
    capacity = num_blocks * block_size
    stems = [[rng.randint(1, 6) for _ in range(capacity)] for _ in range(2)]  # shared beginnings
    owners = [b"one", b"one", b"one", b"two", b"three"][: rng.choice([1, 4, 5])]
    todo = []
    for i in range(num_sequences):
        length = rng.randint(1, max(1, capacity // 2))
        split = rng.randint(0, length)
        prompt = rng.choice(stems)[:split] + [rng.randint(1, 6) for _ in range(length - split)]
        max_tokens = rng.randint(1, max(1, capacity - length))
        owner = rng.choice(owners)
        todo.append((i, prompt, max_tokens, rng.choice([b"", b"", b"key"]), owner))
    alive: set[int] = set()
    for _ in range(50_000):
        if not todo and not world.scheduler.has_work():
            break
        while todo and rng.random() < 0.5:
            alive.add(add(world.scheduler, *todo.pop()).sequence_id)
        if alive and rng.random() < 0.05:
            gone = rng.choice(sorted(alive))
            world.scheduler.abort(gone)
            alive.discard(gone)
            world.check_ownership()
        if world.scheduler.has_work():
            _, finished = world.step(rng)
            for seq, reason in finished.items():
                alive.remove(seq.sequence_id)
                assert reason in ("stop", "length", "error")
                if reason == "length":
                    assert seq.num_output_tokens == seq.params.max_tokens
                if reason == "stop":
                    assert seq.token_ids[-1] == STOP
                assert STOP not in seq.token_ids[seq.num_prompt_tokens : -1]
    assert not alive and world.blocks.num_free == num_blocks


def drive(world: World, *args: object, steps: int = 1000) -> Sequence:
    """A sequence added (`add`) and run to its end."""
    rng = random.Random(1)
    seq = add(world.scheduler, *args)  # type: ignore[arg-type]
    while world.scheduler.has_work() and steps:
        world.step(rng)
        steps -= 1
    return seq


def test_a_second_turn_finds_the_first_in_the_cache() -> None:
    world = World(64, 4, 4, 64)
    first = drive(world, 1, list(range(1, 23)), 1)
    second = drive(world, 2, [*first.token_ids, 7, 8, 9], 1)
    assert second.num_cached_tokens == 20  # five full blocks of four
    assert world.scheduler.counters.prefix_hits == 20


def test_an_identical_prompt_leaves_one_token_to_compute() -> None:
    world = World(64, 4, 4, 64)
    prompt = list(range(1, 17))
    drive(world, 1, prompt, 1)
    again = drive(world, 2, prompt, 1)
    assert again.num_cached_tokens == 12


def test_siblings_share_one_prefill_within_a_single_step() -> None:
    world = World(64, 4, 8, 256)
    prompt = list(range(1, 42))
    for i in range(4):
        add(world.scheduler, i, prompt, 5)
    step, _ = world.step(random.Random(0))
    assert step.num_new == [41, 1, 1, 1]


def test_different_salts_share_nothing() -> None:
    world = World(64, 4, 4, 64)
    prompt = list(range(1, 33))
    drive(world, 1, prompt, 1, b"alice")
    other = drive(world, 2, prompt, 1, b"bob")
    assert other.num_cached_tokens == 0


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    world = World(8, 4, 1, 64)
    old, new = [1] * 9, [2] * 9
    drive(world, 1, old, 1)
    drive(world, 2, new, 1)
    drive(world, 3, [3] * 21, 1)  # six blocks: the four blank ones, then the old prefix
    again = drive(world, 4, new, 1)
    assert again.num_cached_tokens == 8
    gone = drive(world, 5, old, 1)
    assert gone.num_cached_tokens == 0


def test_non_finite_logits_leave_nothing_in_the_cache() -> None:
    world = World(16, 4, 2, 64)
    add(world.scheduler, 1, [1] * 12, 4)
    step = world.scheduler.schedule()
    assert world.scheduler.update(step, sampled(step, -1)).finished == {1: "error"}
    again = drive(world, 2, [1] * 12, 1)
    assert again.num_cached_tokens == 0


def test_a_short_late_request_overtakes_a_long_answer() -> None:
    world = World(64, 4, 4, 16)
    order: list[int] = []

    def steps(count: int) -> None:
        for _ in range(count):
            step = world.scheduler.schedule()
            order.extend(world.scheduler.update(step, sampled(step)).finished)

    add(world.scheduler, 1, [1] * 8, 100)
    steps(5)
    add(world.scheduler, 2, [2] * 8, 2)
    steps(3)
    assert order == [2]


def test_decoding_goes_on_beside_the_chunks_of_a_long_prompt() -> None:
    world = World(64, 4, 4, 8)
    talker = add(world.scheduler, 1, [1] * 4, 50)
    step = world.scheduler.schedule()
    world.scheduler.update(step, sampled(step))
    reader = add(world.scheduler, 2, [2] * 100, 5)
    for _ in range(14):
        step = world.scheduler.schedule()
        assert step.seats == [talker.seat, reader.seat] and step.num_new[0] == 1 and step.num_tokens <= 8
        assert world.scheduler.update(step, sampled(step)).sequence_ids == [1]


def test_preemption_takes_the_youngest_and_it_comes_back() -> None:
    world = World(6, 2, 4, 64)
    seqs = [add(world.scheduler, i, [i + 1] * 3, 6) for i in range(3)]
    finished: dict[int, str] = {}
    for _ in range(100):
        if not world.scheduler.has_work():
            break
        step = world.scheduler.schedule()
        finished |= world.scheduler.update(step, sampled(step)).finished
    assert list(finished.values()) == ["length"] * 3
    assert world.scheduler.counters.preemptions > 0
    assert all(seq.token_ids[3:] == [5] * 6 for seq in seqs)


def test_the_lowest_priority_number_is_admitted_first_and_preempted_last() -> None:
    world = World(6, 2, 3, 64)
    scheduler = world.scheduler
    params = (SamplingParams(max_tokens=6),)
    for sequence_id, priority in ((1, 5), (2, 0), (3, -1), (4, 0)):
        scheduler.add(sequence_id, [sequence_id] * 3, params, priority=priority)
    assert [seq.sequence_id for seq in scheduler.waiting] == [3, 2, 4, 1]
    finished: list[int] = []
    while scheduler.has_work():
        step = scheduler.schedule()
        finished += scheduler.update(step, sampled(step)).finished
    assert finished == [3, 2, 4, 1] and scheduler.counters.preemptions > 0


def test_an_urgent_sequence_keeps_its_memory_though_it_came_last() -> None:
    world = World(4, 2, 2, 64)
    late = add(world.scheduler, 1, [1] * 2, 6)
    step = world.scheduler.schedule()
    world.scheduler.update(step, sampled(step))
    world.scheduler.add(2, [2] * 2, (late.params,), priority=-1)
    urgent = world.scheduler.waiting.first()
    while late in world.scheduler.running:
        step = world.scheduler.schedule()
        world.scheduler.update(step, sampled(step))
    assert urgent in world.scheduler.running and list(world.scheduler.waiting) == [late]


def test_a_sequence_is_not_admitted_again_before_its_tokens_are_known() -> None:
    world = World(16, 4, 2, 64)
    seq = add(world.scheduler, 1, [1] * 5, 4)
    first = world.scheduler.schedule()
    assert (len(first.admitted), first.num_sampled, seq.num_tokens_in_flight) == (1, [1], 1)
    world.scheduler.preempt(seq)
    assert world.scheduler.schedule().seats == []
    world.scheduler.update(first, sampled(first, 3))
    second = world.scheduler.schedule()
    assert second.admitted[0].token_ids == [1] * 5 + [3] and second.num_computed[0] + second.num_new[0] == 6


def test_what_can_never_fit_is_refused() -> None:
    world = World(4, 4, 4, 64)
    assert not world.scheduler.add(1, [1] * 10, (SamplingParams(max_tokens=7),))
    assert not world.scheduler.add(1, [], (SamplingParams(max_tokens=7),))
    assert world.scheduler.add(1, [1] * 10, (SamplingParams(max_tokens=6),)) and world.scheduler.has_work()


def test_grow_changes_nothing_when_it_says_no() -> None:
    blocks = BlockManager(3, 4)
    table: list[int] = []
    assert blocks.grow(table, 8)
    assert not blocks.grow(table, 17) and len(table) == 2 and blocks.num_free == 1
    assert not blocks.grow(table, 12, keep_free=1)
    blocks.release(table)
    assert table == [] and blocks.num_free == 3


def test_block_hashes_chain_and_are_salted() -> None:
    assert block_hash(b"", [1, 2]) != block_hash(b"x", [1, 2])
    assert block_hash(block_hash(b"", [1, 2]), [3, 4]) != block_hash(block_hash(b"", [2, 1]), [3, 4])
    assert block_hash(b"", [1, 2]) == block_hash(b"", (1, 2))


def test_a_step_costs_a_hundred_lines_a_sequence_however_many_there_are() -> None:
    """Some 2 ms for 256, on a core that runs 12 million lines a second: less than a step of theirs takes on a GPU."""
    for num in (16, 256):
        world = World(num * 4, 16, num, 4096)
        for i in range(num):
            add(world.scheduler, i, [i + 1] * 8, 40)

        def step(world: World = world) -> None:
            step = world.scheduler.schedule()
            world.scheduler.update(step, sampled(step))

        lines = sorted(lines_run(step) / num for _ in range(20))
        assert lines[10] < 100 and lines[-1] < 150, lines


@pytest.mark.parametrize(("num_decoding", "prompt_tokens"), [(0, 64), (1, 46), (9, 30), (20, 16), (60, 4)])
def test_prompts_beside_sequences_that_decode_get_less_of_a_step(num_decoding: int, prompt_tokens: int) -> None:
    scheduler = Scheduler(BlockManager(400, 4), max_num_seqs=80, max_num_batched_tokens=64)
    for i in range(num_decoding):
        add(scheduler, i, [i], 100)
    scheduler.schedule()
    add(scheduler, 99, [2] * 200, 8)
    assert scheduler.schedule().num_new == [1] * num_decoding + [prompt_tokens]


@pytest.mark.parametrize(
    ("num_decoding", "num_rows"), [(0, 2048), (1, 1536), (100, 1344), (200, 1344), (256, 1344), (600, 1152)]
)
def test_many_rows_fill_the_tiles_of_the_products(num_decoding: int, num_rows: int) -> None:
    scheduler = Scheduler(BlockManager(4000, 4), max_num_seqs=700, max_num_batched_tokens=2048, row_multiple=192)
    for i in range(num_decoding):
        add(scheduler, i, [i], 100)
    scheduler.schedule()
    add(scheduler, 9999, [2] * 4000, 8)
    assert scheduler.schedule().num_tokens == num_rows


def test_few_rows_are_not_rounded() -> None:
    scheduler = Scheduler(BlockManager(400, 4), max_num_seqs=80, max_num_batched_tokens=64, row_multiple=192)
    add(scheduler, 0, [1], 100)
    scheduler.schedule()
    add(scheduler, 99, [2] * 200, 8)
    assert scheduler.schedule().num_new == [1, 46]


@given(
    tokens=st.lists(st.sampled_from([5, 6, 7, 2, -1, -2]), min_size=2, max_size=9),
    max_tokens=st.integers(2, 10),
    before=st.integers(0, 3),
    caching=st.booleans(),
)
def test_tokens_taken_at_once_are_taken_as_one_by_one(
    tokens: list[int], max_tokens: int, before: int, caching: bool
) -> None:
    def taken(places: list[range]) -> tuple[object, ...]:
        scheduler = Scheduler(BlockManager(20, 2), 2, 64, caching)
        params = SamplingParams(max_tokens=max_tokens + before, stop_token_ids=(2,), temperature=0)
        assert scheduler.add(7, [3, 4, 5], (params,))
        scheduler.schedule()
        (seq,) = scheduler.running
        assert scheduler.blocks.grow(seq.block_table, 20)
        for token in range(10, 10 + before):
            seq.append(token)
        seq.num_computed_tokens = len(seq.token_ids) + len(tokens)
        progress, reason = Progress(), None
        for part in places:
            reason = scheduler._take(seq, tokens, part, progress)
            if reason is not None:
                break
        found = [scheduler.blocks.share([], seq.block_hashes)] if caching else []
        return progress, reason, seq.token_ids, seq.block_hashes, found

    assert taken([range(len(tokens))]) == taken([range(i, i + 1) for i in range(len(tokens))])
