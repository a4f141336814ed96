"""Random workloads against a model of the KV cache: the scheduler's promises, kept in every step."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptq_api.scheduler.blocks import BlockManager, block_hash
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.sequence import Batch, Sampled, Sequence
from gptq_api.types import SamplingParams

STOP = 0


def sequence(sequence_id: int, prompt: list[int], max_tokens: int, salt: bytes = b"") -> Sequence:
    return Sequence(sequence_id, list(prompt), SamplingParams(max_tokens=max_tokens, stop_token_ids=(STOP,)), salt)


class World:
    """A scheduler, and a KV cache that remembers for every slot the exact prefix it was written for."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int, budget: int, caching: bool = True) -> None:
        self.blocks = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(self.blocks, max_num_seqs, budget, caching)
        self.kv: dict[int, tuple[bytes, tuple[int, ...]]] = {}

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

    def step(self, sample: random.Random) -> tuple[Batch, dict[Sequence, str]]:
        scheduler = self.scheduler
        batch = scheduler.schedule()
        assert batch.sequences, "work, but no progress"
        assert batch.num_tokens <= scheduler.max_num_batched_tokens
        assert len(batch.sequences) <= scheduler.max_num_seqs
        assert len(set(batch.sequences)) == len(batch.sequences)
        spans = list(zip(batch.sequences, batch.num_computed_tokens, batch.num_new_tokens, strict=True))
        for seq, start, n in spans:
            assert seq in scheduler.running and n >= 1
            for position in range(start, start + n):
                self.kv[self.slot(seq, position)] = (seq.cache_salt, tuple(seq.token_ids[: position + 1]))
        for seq, start, n in spans:  # after all writes: as a layer does
            assert seq.num_computed_tokens == start + n
            for position in range(start + n):
                expected = (seq.cache_salt, tuple(seq.token_ids[: position + 1]))
                assert self.kv.get(self.slot(seq, position)) == expected, "stale KV read"
        assert batch.samples == [start + n == len(seq.token_ids) for seq, start, n in spans]
        tokens: list[int | None] = []
        for samples in batch.samples:
            tokens.append(
                sample.choice([STOP, 1, 2, 3, 4, 5, -1 if sample.random() < 0.02 else 6]) if samples else None
            )
        finished = scheduler.update(batch, Sampled(tokens, [None] * len(tokens)))
        for seq in finished:
            assert not seq.block_table
        self.check_ownership()
        return batch, dict(finished)


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
def test_random_workloads(
    seed: int, num_blocks: int, block_size: int, max_num_seqs: int, budget: int, num_sequences: int, caching: bool
) -> None:
    rng = random.Random(seed)
    world = World(num_blocks, block_size, max_num_seqs, budget, caching)
    capacity = num_blocks * block_size
    stems = [[rng.randint(1, 6) for _ in range(capacity)] for _ in range(2)]  # shared beginnings
    todo = []
    for i in range(num_sequences):
        length = rng.randint(1, max(1, capacity // 2))
        split = rng.randint(0, length)
        prompt = rng.choice(stems)[:split] + [rng.randint(1, 6) for _ in range(length - split)]
        todo.append(sequence(i, prompt, rng.randint(1, max(1, capacity - length)), rng.choice([b"", b"", b"key"])))
    alive: set[int] = set()
    for _ in range(50_000):
        if not todo and not world.scheduler.has_work():
            break
        while todo and rng.random() < 0.5:
            seq = todo.pop()
            alive.add(seq.sequence_id)
            world.scheduler.add(seq)
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


def drive(world: World, *seqs: Sequence, steps: int = 1000) -> None:
    rng = random.Random(1)
    for seq in seqs:
        world.scheduler.add(seq)
    while world.scheduler.has_work() and steps:
        world.step(rng)
        steps -= 1


def test_a_second_turn_finds_the_first_in_the_cache() -> None:
    world = World(64, 4, 4, 64)
    first = sequence(1, list(range(1, 23)), 1)
    drive(world, first)
    second = sequence(2, [*first.token_ids, 7, 8, 9], 1)
    drive(world, second)
    assert second.num_cached_tokens == 20  # five full blocks of four
    assert world.scheduler.counters.prefix_hits == 20


def test_an_identical_prompt_leaves_one_token_to_compute() -> None:
    world = World(64, 4, 4, 64)
    prompt = list(range(1, 17))
    drive(world, sequence(1, prompt, 1))
    again = sequence(2, prompt, 1)
    drive(world, again)
    assert again.num_cached_tokens == 12


def test_siblings_share_one_prefill_within_a_single_step() -> None:
    world = World(64, 4, 8, 256)
    prompt = list(range(1, 42))
    siblings = [sequence(i, prompt, 5) for i in range(4)]
    for seq in siblings:
        world.scheduler.add(seq)
    batch, _ = world.step(random.Random(0))
    assert batch.num_new_tokens == [41, 1, 1, 1]


def test_different_salts_share_nothing() -> None:
    world = World(64, 4, 4, 64)
    prompt = list(range(1, 33))
    drive(world, sequence(1, prompt, 1, b"alice"))
    other = sequence(2, prompt, 1, b"bob")
    drive(world, other)
    assert other.num_cached_tokens == 0


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    world = World(8, 4, 1, 64)
    old, new = [1] * 9, [2] * 9
    drive(world, sequence(1, old, 1))
    drive(world, sequence(2, new, 1))
    drive(world, sequence(3, [3] * 21, 1))  # six blocks: the four blank ones, then the old prefix
    again = sequence(4, new, 1)
    drive(world, again)
    assert again.num_cached_tokens == 8
    gone = sequence(5, old, 1)
    drive(world, gone)
    assert gone.num_cached_tokens == 0


def test_non_finite_logits_leave_nothing_in_the_cache() -> None:
    world = World(16, 4, 2, 64)
    seq = sequence(1, [1] * 12, 4)
    world.scheduler.add(seq)
    batch = world.scheduler.schedule()
    assert world.scheduler.update(batch, Sampled([-1], [None])) == {seq: "error"}
    again = sequence(2, [1] * 12, 1)
    drive(world, again)
    assert again.num_cached_tokens == 0


def test_a_short_late_request_overtakes_a_long_answer() -> None:
    world = World(64, 4, 4, 16)
    order: list[int] = []

    def steps(count: int) -> None:
        for _ in range(count):
            batch = world.scheduler.schedule()
            done = world.scheduler.update(batch, Sampled([5] * len(batch.sequences), [None] * len(batch.sequences)))
            order.extend(seq.sequence_id for seq in done)

    world.scheduler.add(sequence(1, [1] * 8, 100))
    steps(5)
    world.scheduler.add(sequence(2, [2] * 8, 2))
    steps(3)
    assert order == [2]


def test_decoding_goes_on_beside_the_chunks_of_a_long_prompt() -> None:
    world = World(64, 4, 4, 8)
    talker, reader = sequence(1, [1] * 4, 50), sequence(2, [2] * 100, 5)
    world.scheduler.add(talker)
    world.scheduler.update(world.scheduler.schedule(), Sampled([5], [None]))
    world.scheduler.add(reader)
    for _ in range(14):
        batch = world.scheduler.schedule()
        assert batch.sequences == [talker, reader] and batch.num_new_tokens[0] == 1 and batch.num_tokens <= 8
        world.scheduler.update(batch, Sampled([5, None], [None, None]))


def test_preemption_takes_the_youngest_and_it_comes_back() -> None:
    world = World(6, 2, 4, 64)
    seqs = [sequence(i, [i + 1] * 3, 6) for i in range(3)]
    for seq in seqs:
        world.scheduler.add(seq)
    finished: dict[Sequence, str] = {}
    for _ in range(100):
        if not world.scheduler.has_work():
            break
        batch = world.scheduler.schedule()
        tokens = [5 if samples else None for samples in batch.samples]
        finished |= world.scheduler.update(batch, Sampled(tokens, [None] * len(tokens)))
    assert list(finished.values()) == ["length"] * 3
    assert world.scheduler.counters.preemptions > 0
    assert all(seq.token_ids[3:] == [5] * 6 for seq in seqs)


def test_a_sequence_is_not_admitted_again_before_its_tokens_are_known() -> None:
    world = World(16, 4, 2, 64)
    seq = sequence(1, [1] * 5, 4)
    world.scheduler.add(seq)
    first = world.scheduler.schedule()
    assert (first.num_admitted, first.samples, seq.num_tokens_in_flight) == (1, [True], 1)
    world.scheduler.preempt_youngest()
    assert world.scheduler.schedule().sequences == []
    world.scheduler.update(first, Sampled([3], [None]))
    second = world.scheduler.schedule()
    assert second.sequences == [seq] and second.num_computed_tokens[0] + second.num_new_tokens[0] == 6


def test_what_can_never_fit_is_refused() -> None:
    world = World(4, 4, 4, 64)
    with pytest.raises(ValueError, match="never fit"):
        world.scheduler.add(sequence(1, [1] * 10, 7))
    with pytest.raises(ValueError, match="never fit"):
        world.scheduler.add(sequence(1, [], 7))


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


def test_a_step_of_256_sequences_costs_less_than_a_gpu_step() -> None:
    world = World(256 * 4, 16, 256, 4096)
    for i in range(256):
        world.scheduler.add(sequence(i, [i + 1] * 8, 40))
    elapsed: list[float] = []
    for _ in range(20):
        started = time.perf_counter()
        world.scheduler.update(world.scheduler.schedule(), Sampled([5] * 256, [None] * 256))
        elapsed.append(time.perf_counter() - started)
    assert min(elapsed) < 0.002, f"{min(elapsed) * 1e3:.2f} ms"


@pytest.mark.parametrize(("num_decoding", "prompt_tokens"), [(0, 64), (1, 46), (9, 30), (20, 16), (60, 4)])
def test_prompts_beside_sequences_that_decode_get_less_of_a_step(num_decoding: int, prompt_tokens: int) -> None:
    scheduler = Scheduler(BlockManager(400, 4), max_num_seqs=80, max_num_batched_tokens=64)
    for i in range(num_decoding):
        scheduler.add(sequence(i, [i], 100))
    scheduler.schedule()
    scheduler.add(sequence(99, [2] * 200, 8))
    assert scheduler.schedule().num_new_tokens == [1] * num_decoding + [prompt_tokens]


@pytest.mark.parametrize(
    ("num_decoding", "num_rows"), [(0, 2048), (1, 1536), (100, 1344), (200, 1344), (256, 1344), (600, 1152)]
)
def test_many_rows_fill_the_tiles_of_the_products(num_decoding: int, num_rows: int) -> None:
    scheduler = Scheduler(BlockManager(4000, 4), max_num_seqs=700, max_num_batched_tokens=2048, row_multiple=192)
    for i in range(num_decoding):
        scheduler.add(sequence(i, [i], 100))
    scheduler.schedule()
    scheduler.add(sequence(9999, [2] * 4000, 8))
    assert scheduler.schedule().num_tokens == num_rows


def test_few_rows_are_not_rounded() -> None:
    scheduler = Scheduler(BlockManager(400, 4), max_num_seqs=80, max_num_batched_tokens=64, row_multiple=192)
    scheduler.add(sequence(0, [1], 100))
    scheduler.schedule()
    scheduler.add(sequence(99, [2] * 200, 8))
    assert scheduler.schedule().num_new_tokens == [1, 46]
