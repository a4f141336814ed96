"""The engine one step ahead of what it knows: the same tokens as one that waits, for any workload."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptq_api.engine.core import Engine
from gptq_api.scheduler.blocks import BlockManager, block_hash
from gptq_api.scheduler.drafts import DraftSource, PastAnswers, TextDrafts
from gptq_api.scheduler.model_drafts import ModelDrafts
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.scheduler.sequence import Sequence
from gptq_api.scheduler.speculation import Speculation
from gptq_api.step import Sampled
from gptq_api.types import Add, SamplingParams, StepOutput, pack_ids, unpack_ids
from tests.support.draft_sources import Fickle, Garbage, Silent, Truth
from tests.support.toy_drafter import ToyDrafter
from tests.support.toy_runner import NUM_TOKENS, STOP, Launched, ToyRunner, expected, next_token, score


def truth() -> Truth:
    """To the end of a sequence and beyond."""

    def following(seq: Sequence, tokens: list[int]) -> int:
        return next_token(tokens, seq.num_prompt_tokens, seq.params)

    return Truth(following)


SOURCES: dict[str, Callable[[], DraftSource]] = {
    "truth": truth,
    "garbage": lambda: Garbage(NUM_TOKENS),
    "fickle": lambda: Fickle(truth(), Garbage(NUM_TOKENS)),
    "texts": lambda: TextDrafts(PastAnswers(most_tokens=100, longest=20)),
    "none": Silent,
}


class World:
    """An engine on a toy runner, and what each sequence got from it."""

    def __init__(
        self,
        lookahead: int = 1,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 64,
        caching: bool = True,
        out_of_memory: float = 0.0,
        max_tokens: int = 10**9,
        draft_rows: int = 0,
        drafts: str = "truth",
        row_cost: float = 0.0,
        wait_cost: float = 0.0,
        confirms: float = 1.0,
        shared_rows: int | None = None,
        apart: bool = False,
        drafter: ToyDrafter | None = None,
    ) -> None:
        device = (max_num_seqs, block_size, out_of_memory, max_tokens)
        self.runner = ToyRunner(lookahead, *device, draft_rows, confirms, prompts_apart=apart)
        self.blocks = BlockManager(num_blocks, block_size)
        self.drafter, model = drafter, None
        if drafter is not None:
            model = ModelDrafts(drafter, NUM_TOKENS, block_size)
        speculation = None
        if draft_rows:
            speculation = Speculation(SOURCES[drafts](), draft_rows, row_cost, wait_cost, model=model)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs,
            budget,
            caching,
            shared_rows=shared_rows,
            speculation=speculation,
            prompts_apart=apart,
        )
        self.engine: Engine[Launched] = Engine(self.runner, self.scheduler)
        self.prompts: dict[int, tuple[list[int], SamplingParams]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.scores: dict[int, list[float]] = {}
        self.finished: dict[int, str] = {}
        self.aborted: set[int] = set()
        self.drafted: dict[int, tuple[int, int]] = {}
        self.outputs: list[StepOutput] = []

    def add(self, prompt: list[int], salt: bytes = b"", **params: object) -> int:
        return self.add_samples(prompt, [params], salt)[0]

    def add_samples(
        self,
        prompt: list[int],
        samples: list[dict[str, object]],
        salt: bytes = b"",
        priority: int = 0,
        owner: bytes = b"",
    ) -> list[int]:
        """One submission."""
        first = len(self.prompts) + 1
        made = tuple(
            SamplingParams(**{"max_tokens": 10, "stop_token_ids": (STOP,), **params})  # type: ignore[arg-type]
            for params in samples
        )
        self.prompts |= {first + i: (prompt, params) for i, params in enumerate(made)}
        self.tokens |= {first + i: [] for i in range(len(made))}
        self.engine.add(Add(first, pack_ids(prompt), made, salt, priority, owner, max(priority, 0)))
        return list(range(first, first + len(made)))

    def abort(self, sequence_id: int) -> None:
        self.aborted.add(sequence_id)
        self.engine.abort(sequence_id)

    def step(self) -> StepOutput | None:
        output = self.engine.step()
        seats = [seq.seat for seq in self.scheduler.running]
        assert len(set(seats)) == len(seats) and min(seats, default=0) >= 0
        assert all(seq.seat == -1 and not seq.block_table for seq in self.scheduler.waiting)
        assert len(list(self.scheduler.waiting)) == len(self.scheduler.waiting)
        assert self.scheduler.waiting.num_owners == len({seq.owner for seq in self.scheduler._live.values()})
        if output is not None:
            self.outputs.append(output)
            told: set[int] = set()  # whose first token this is
            for sequence_id, scores in output.prompt_logprobs.items():
                assert sequence_id not in self.finished and sequence_id not in self.aborted, "news of the dead"
                assert not self.tokens[sequence_id], "later than a token"
                got = self.scores.setdefault(sequence_id, [])
                assert scores.first == len(got) + 1, "twice, or not at all"
                got += array("f", scores.logprobs)
            for sequence_id, token in zip(unpack_ids(output.sequence_ids), unpack_ids(output.tokens), strict=True):
                assert sequence_id not in self.finished and sequence_id not in self.aborted, "news of the dead"
                assert token >= 0
                if not self.tokens[sequence_id]:
                    assert sequence_id in output.cached_tokens
                    told.add(sequence_id)
                self.tokens[sequence_id].append(token)
            assert {i for i in output.cached_tokens if self.prompts[i][1].max_tokens} == told
            for sequence_id, reason in output.finished.items():
                assert sequence_id not in self.finished and sequence_id not in self.aborted
                self.finished[sequence_id] = reason
            assert output.drafted.keys().isdisjoint(self.finished.keys() - output.finished.keys())
            for sequence_id, part in output.predicted.items():
                assert all(num <= of for num, of in zip(part, output.drafted[sequence_id], strict=True))
            self.drafted |= output.drafted
        return output

    def drain(self, most: int = 20_000) -> None:
        while self.engine.has_work():
            self.step()
            most -= 1
            assert most, "no end"

    def check(self) -> None:
        """After the end: everybody got what a lone sequence gets, and all memory is free."""
        for sequence_id, (prompt, params) in self.prompts.items():
            tokens, reason = expected(prompt, params)
            wanted = [] if params.prompt_logprobs is None else [score(prompt[: i + 2]) for i in range(len(prompt) - 1)]
            scores = self.scores.get(sequence_id, [])
            assert scores == wanted[: len(scores)] and (sequence_id in self.aborted or len(scores) == len(wanted))
            if sequence_id in self.aborted:
                assert self.tokens[sequence_id] == tokens[: len(self.tokens[sequence_id])]
            else:
                assert (self.tokens[sequence_id], self.finished[sequence_id]) == (tokens, reason)
        assert self.blocks.num_free == self.blocks.num_blocks
        assert sorted(self.scheduler._free_seats) == list(range(self.scheduler.max_num_seqs))
        assert not self.scheduler._live
        counters, told = self.scheduler.counters, list(self.drafted.values())
        assert all(accepted >= 0 <= rejected and accepted + rejected > 0 for accepted, rejected in told)
        assert all(accepted <= len(self.tokens[i]) for i, (accepted, _) in self.drafted.items())
        assert sum(accepted for accepted, _ in told) <= counters.accepted_tokens <= self.runner.num_confirmed
        assert sum(map(sum, told)) <= counters.draft_tokens
        if not self.aborted:
            assert sum(map(sum, told)) == counters.draft_tokens
            assert sum(accepted for accepted, _ in told) == counters.accepted_tokens


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    lookahead=st.sampled_from([0, 1, 1, 1]),
    num_blocks=st.integers(2, 40),
    block_size=st.sampled_from([1, 2, 4, 16]),
    max_num_seqs=st.integers(1, 8),
    budget=st.integers(1, 40),
    num_sequences=st.integers(1, 25),
    caching=st.booleans(),
    out_of_memory=st.sampled_from([0.0, 0.0, 0.1, 0.5]),
    draft_rows=st.sampled_from([0, 2, 4, 8, 8]),
    drafts=st.sampled_from(sorted(SOURCES)),
    confirms=st.sampled_from([1.0, 1.0, 0.6]),
    shared_rows=st.sampled_from([None, None, 1, 3]),
    apart=st.booleans(),
    right=st.sampled_from([None, None, 1.0, 0.7, 0.0]),
)
@pytest.mark.slow
def test_random_workloads(
    seed: int,
    lookahead: int,
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    budget: int,
    num_sequences: int,
    caching: bool,
    out_of_memory: float,
    draft_rows: int,
    drafts: str,
    confirms: float,
    shared_rows: int | None,
    apart: bool,
    right: float | None,
) -> None:
    """`right`: of a draft model, which is out of memory as often as the other."""
    rng, drafter = random.Random(seed), None
    if right is not None:
        limits = (rng.choice([1, 16, 100]), rng.choice([20, 10**6]))
        drafter = ToyDrafter(block_size, right, *limits, out_of_memory / 2, ahead=rng.randrange(2))
    world = World(
        lookahead,
        num_blocks,
        block_size,
        max_num_seqs,
        budget,
        caching,
        out_of_memory,
        draft_rows=draft_rows,
        drafts=drafts,
        confirms=confirms,
        shared_rows=shared_rows,
        apart=apart,
        drafter=drafter,
    )
    capacity = num_blocks * block_size
    stems = [[rng.randrange(1, NUM_TOKENS) for _ in range(capacity)] for _ in range(2)]  # shared beginnings
    owners = [b"one", b"one", b"one", b"two", b"three"][: rng.choice([1, 4, 5])]
    left = num_sequences
    for _ in range(50_000):
        if not left and not world.engine.has_work():
            break
        while left and rng.random() < 0.3:
            length = rng.randint(1, max(1, capacity // 2))
            split = rng.randint(0, length)
            prompt = rng.choice(stems)[:split] + [rng.randrange(1, NUM_TOKENS) for _ in range(length - split)]
            most = rng.choice([1, 2, capacity - length, rng.randint(1, max(1, capacity - length))])
            samples: list[dict[str, object]] = [
                {
                    "max_tokens": max(1, min(most, capacity - length)) if rng.random() < 0.9 else 0,
                    "prompt_logprobs": rng.choice([None, None, None, 0, 3]),
                    "min_tokens": rng.choice([0, 0, 5]),
                    "stop_token_ids": rng.choice([(), (STOP,), (STOP, 1, 2)]),
                    "seed": i + rng.randrange(2),
                    "logit_bias": {1: 1.0} if rng.random() < 0.2 else {},
                }
                for i in range(rng.choice([1, 1, 3]))
            ]
            owner = rng.choice(owners)
            if rng.random() < 0.5:
                world.add_samples(prompt, samples, rng.choice([b"", b"", b"key"]), rng.choice([0, 0, -1, 7]), owner)
            else:
                for sample in samples:
                    world.add_samples(prompt, [sample], rng.choice([b"", b"", b"key"]), rng.choice([0, 0, 0, 3]), owner)
            left -= 1
        if world.tokens and rng.random() < 0.05:
            gone = rng.choice(sorted(world.tokens))
            if gone not in world.finished:
                world.abort(gone)
        if world.engine.has_work():
            world.step()
    assert not left and not world.engine.has_work()
    world.check()


def first_seed(wanted: Callable[[list[int], str], bool], **params: object) -> int:
    """A seed with which the prompt of the tests below is answered as wanted."""
    made = {"max_tokens": 10, "stop_token_ids": (STOP,), **params}
    return next(s for s in range(10_000) if wanted(*expected(PROMPT, SamplingParams(seed=s, **made))))  # type: ignore[arg-type]


PROMPT = [1, 2, 3, 4, 5]


def test_a_step_is_launched_before_the_one_before_it_is_collected() -> None:
    world = World()
    world.add(PROMPT, max_tokens=6, stop_token_ids=())
    assert world.step() is None
    for i in range(6):
        world.step()
        assert len(world.tokens[1]) == i + 1, "one token a step, from the second on"
    assert world.runner.most_in_flight == 2
    assert not world.engine.has_work()
    assert world.runner.num_rows == len(PROMPT) + 5, "nothing in surplus where max_tokens is the end"
    world.check()


def test_a_stop_token_costs_one_row_that_nobody_sees() -> None:
    seed = first_seed(lambda tokens, reason: reason == "stop" and len(tokens) == 4)
    world = World()
    world.add(PROMPT, seed=seed)
    world.drain()
    assert world.runner.num_rows == len(PROMPT) + 4
    assert not unpack_ids(world.outputs[-1].tokens) and world.outputs[-1].stats.num_running == 0
    world.check()


def test_one_token_is_reported_without_a_second_step() -> None:
    world = World()
    world.add(PROMPT, max_tokens=1)
    assert world.step() is None
    assert world.step() is not None and len(world.tokens[1]) == 1
    assert not world.engine.has_work() and world.runner.num_rows == len(PROMPT)
    world.check()


def test_whoever_arrives_while_a_step_is_in_flight_is_in_the_next_one() -> None:
    world = World()
    world.add(PROMPT, max_tokens=8, stop_token_ids=())
    world.step()
    world.step()
    late = world.add([7, 7, 7], max_tokens=1)
    world.step()  # launches it
    world.step()  # brings its token
    assert late in world.finished


def test_a_block_that_ends_in_an_unknown_token_is_found_when_it_is_known() -> None:
    world = World(block_size=4, num_blocks=32)
    world.add(PROMPT, max_tokens=8, stop_token_ids=())
    world.drain()
    answer = world.tokens[1]
    second = world.add([*PROMPT, *answer], max_tokens=1)
    world.drain()
    assert {k: v for o in world.outputs for k, v in o.cached_tokens.items()}[second] == 12  # of 13, the last uncomputed
    world.check()


def test_a_token_arrives_at_a_sequence_that_was_preempted_meanwhile() -> None:
    world = World(num_blocks=6, block_size=2, max_num_seqs=2)
    for _ in range(2):
        world.add([1, 2, 3], max_tokens=9, stop_token_ids=(), seed=len(world.prompts))
    seen: list[Any] = []
    collect = world.runner.collect

    def look(launched: Launched) -> Sampled:
        seen.extend(seq for seq in world.scheduler.waiting if seq.num_tokens_in_flight)
        return collect(launched)

    world.runner.collect = look  # type: ignore[method-assign]
    world.drain()
    assert seen and world.scheduler.counters.preemptions > 0
    world.check()


@pytest.mark.parametrize("num_steps", range(1, 8))
def test_abort_with_a_step_in_flight(num_steps: int) -> None:
    world = World()
    gone = world.add(PROMPT, max_tokens=20, stop_token_ids=())
    stays = world.add(PROMPT, max_tokens=20, stop_token_ids=(), seed=1)
    for _ in range(num_steps):
        world.step()
    world.abort(gone)
    assert [seq.sequence_id for seq in world.scheduler.running] == [stays]
    world.add([6, 6], max_tokens=3)  # takes its seat, and its blocks
    world.drain()
    assert len(world.tokens[gone]) == num_steps - 1
    world.check()


@pytest.mark.parametrize("aborted", [False, True])
def test_non_finite_logits_leave_nothing_in_the_cache(aborted: bool) -> None:
    """Not even where the sequence had gone before that was known."""
    long = PROMPT * 3
    params: dict[str, Any] = {"logit_bias": {1: 1.0}, "max_tokens": 5}
    seed = next(s for s in range(1000) if expected(long, SamplingParams(seed=s, **params)) == ([], "error"))
    world = World()
    sick = world.add(long, seed=seed, **params)
    world.step()
    if aborted:
        world.abort(sick)
    world.drain()
    again = world.add(long, max_tokens=1)
    world.drain()
    assert world.outputs[-1].cached_tokens[again] == 0
    world.check()


def test_what_the_device_has_no_memory_for_is_done_in_smaller_steps() -> None:
    world = World(budget=64, max_tokens=10)
    for i in range(6):
        world.add([1 + i, *PROMPT * 3], max_tokens=6, seed=i)
    world.drain()
    assert max(output.stats.num_batched_tokens for output in world.outputs) <= 10
    world.check()


def test_what_the_device_has_no_memory_for_at_all_ends_with_an_error_and_the_engine_lives() -> None:
    world = World(max_tokens=0)
    lost = [world.add(PROMPT), world.add(PROMPT)]
    world.drain()
    assert [world.finished[i] for i in lost] == ["error", "error"]
    world.runner.max_tokens = 10**9
    well = world.add(PROMPT)
    world.drain()
    assert (world.tokens[well], world.finished[well]) == expected(*world.prompts[well])


def test_what_can_never_fit_ends_with_an_error() -> None:
    world = World(num_blocks=2)
    lost = world.add(PROMPT, max_tokens=4)
    assert world.engine.has_work()
    assert world.step() is not None and world.finished == {lost: "error"}
    assert not world.engine.has_work()


@pytest.mark.parametrize("lookahead", [0, 1])
def test_drafted_tokens_bring_the_same_text_in_fewer_steps(lookahead: int) -> None:
    """A sequence gets one to eight tokens from a step, in the order of its text; surplus ones are nobody's."""
    plain, drafting = World(lookahead), World(lookahead, draft_rows=8, row_cost=0.02, wait_cost=0.1 * lookahead)
    for world in (plain, drafting):
        for seed in (1, 2):
            world.add(PROMPT, max_tokens=60, stop_token_ids=(), seed=seed)
        while world.engine.has_work():
            world.step()
            if lookahead and world.scheduler.has_work():
                assert world.engine._in_flight, "the device has work while the host tells what there is"
        world.check()
    assert plain.runner.num_confirmed == 0 < drafting.runner.num_confirmed
    most = max(
        Counter(unpack_ids(output.sequence_ids)).most_common(1)[0][1]
        for output in drafting.outputs
        if output.sequence_ids
    )
    assert most == 4, "eight rows for two"
    assert drafting.runner.num_launches < 0.4 * plain.runner.num_launches
    assert drafting.drafted.keys() == {1, 2}


def test_whoever_guesses_wrong_does_not_keep_the_device_waiting() -> None:
    """A step ahead as without: of drafts that are never right, and of a text that repeats only by chance."""
    for drafts in ("garbage", "texts"):
        world = World(draft_rows=8, drafts=drafts, row_cost=0.02, wait_cost=0.1, num_blocks=1000)
        for seed in range(5):
            world.add(PROMPT, max_tokens=300, stop_token_ids=(), seed=seed)
            world.drain()
        world.check()
        assert world.runner.num_launches > 1480
        assert world.runner.num_late < 90 and world.runner.num_rows < 1.05 * (1500 + 5 * len(PROMPT))


@pytest.mark.parametrize("lookahead", [0, 1])
def test_nothing_behind_the_end_of_a_sequence_is_told_or_counted(lookahead: int) -> None:
    """A stop token, max_tokens, and logits that are not finite among tokens that were drafted rightly."""
    seed = first_seed(lambda tokens, reason: reason == "stop" and len(tokens) == 6)
    world = World(lookahead, draft_rows=8)
    world.add(PROMPT, seed=seed)
    world.drain()
    world.check()
    assert sum(world.drafted[1]) == 7 and world.drafted[1][0] == len(world.tokens[1]) - 1
    world.add(PROMPT, seed=seed, stop_token_ids=(), max_tokens=6)
    world.drain()
    world.check()
    assert world.drafted[2] == (4, 0) and len(world.tokens[2]) == 6, "five rows, for its last five tokens"
    bias: dict[str, Any] = {"logit_bias": {1: 1.0}, "stop_token_ids": (), "max_tokens": 20}
    sick = next(
        s
        for s in range(1000)
        if (found := expected(PROMPT, SamplingParams(seed=s, **bias)))[1] == "error" and len(found[0]) == 4
    )
    world.add(PROMPT, seed=sick, **bias)
    world.drain()
    world.check()
    assert world.finished[3] == "error" and len(world.tokens[3]) == 4


@pytest.mark.parametrize("num_steps", range(1, 5))
@pytest.mark.parametrize("how", ["abort", "preempt"])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_whoever_goes_or_gives_way_with_drafts_in_flight(lookahead: int, how: str, num_steps: int) -> None:
    world = World(lookahead, draft_rows=8)
    for seed in (1, 2):
        world.add(PROMPT, max_tokens=30, stop_token_ids=(), seed=seed)
    for _ in range(num_steps):
        world.step()
    if how == "abort":
        world.abort(1)
    else:
        world.scheduler.preempt(world.scheduler.running[0])
    world.add([6, 6], max_tokens=3)  # takes its seat, and its blocks
    world.drain()
    world.check()


def test_a_step_with_drafts_that_the_device_has_no_memory_for_is_done_with_fewer() -> None:
    for lookahead in (0, 1):
        world = World(lookahead, draft_rows=8, max_tokens=3)
        world.add(PROMPT[:3], max_tokens=40, stop_token_ids=())
        world.drain()
        world.check()
        assert world.runner.num_confirmed > 0 and world.scheduler.counters.draft_tokens > 20


def test_prompts_and_drafts_share_no_step() -> None:
    """The toy runner looks. Whoever comes does not wait for an answer that is drafted to its end."""
    for lookahead in (0, 1):
        world = World(lookahead, draft_rows=8, num_blocks=200)
        world.add(PROMPT, max_tokens=200, stop_token_ids=())
        for _ in range(6):
            world.step()
        late = world.add([7, 7, 7], max_tokens=1)
        for _ in range(3):
            world.step()
        assert late in world.finished and 1 not in world.finished
        world.drain()
        world.check()


def test_a_prediction_is_taken_as_far_as_the_model_has_rows_for_it() -> None:
    params = SamplingParams(max_tokens=30, seed=3)
    right, _ = expected(PROMPT, params)
    for prediction, accepted in (
        (right, len(right) - 5),
        ([*right[:4], NUM_TOKENS, *right[5:]], 2),
        ([-1], 0),
        ([7] * 1000, 0),
    ):
        world = World(0, draft_rows=8, drafts="texts", row_cost=0.02)
        world.prompts[1], world.tokens[1] = (PROMPT, params), []
        world.engine.add(Add(1, pack_ids(PROMPT), (params,), prediction=pack_ids(prediction)))
        world.drain()
        world.check()
        assert world.scheduler.counters.accepted_tokens >= accepted
        told = next((output.predicted[1] for output in reversed(world.outputs) if 1 in output.predicted), (0, 0))
        assert told[0] >= accepted and (accepted or not told[0])


def test_guesses_take_nobodys_memory() -> None:
    """Where the cache has no room for drafted tokens, a step goes without, and nobody is preempted for them."""
    world = World(0, num_blocks=4, block_size=2, max_num_seqs=1, draft_rows=4)
    world.add([1, 2, 3], max_tokens=5, stop_token_ids=())
    world.drain()
    assert world.scheduler.counters.preemptions == 0
    world.check()


def test_samples_of_one_submission_share_their_prompt_until_they_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight samples hold one list of ids, and each block of the prompt is hashed once."""
    hashed: list[list[int]] = []

    def count(parent: bytes, token_ids: list[int]) -> bytes:
        hashed.append(list(token_ids))
        return block_hash(parent, token_ids)

    monkeypatch.setattr("gptq_api.scheduler.scheduler.block_hash", count)
    world = World(block_size=4, max_num_seqs=3)
    prompt = PROMPT * 5
    ids = world.add_samples(prompt, [{"seed": seed, "max_tokens": 3, "stop_token_ids": ()} for seed in range(8)])
    assert len({id(seq.token_ids) for seq in world.scheduler.waiting}) == 1
    world.drain()
    assert hashed == [prompt[i : i + 4] for i in range(0, 24, 4)]
    cached = {k: v for output in world.outputs for k, v in output.cached_tokens.items()}
    assert [cached[i] for i in ids] == [0] + [24] * 7
    assert len({tuple(world.tokens[i]) for i in ids}) > 1
    world.check()


def test_samples_of_one_submission_may_be_aborted_one_by_one() -> None:
    world = World(max_num_seqs=2)
    ids = world.add_samples(PROMPT, [{"seed": seed, "max_tokens": 20, "stop_token_ids": ()} for seed in range(4)])
    for i in range(3):
        world.step()
        world.abort(ids[i])
    world.drain()
    assert list(world.finished) == [ids[3]]
    world.check()


@pytest.mark.parametrize("samples", [[{}, {"stop_token_ids": (NUM_TOKENS,)}], [{}, {"max_tokens": 10**6}]])
def test_a_submission_is_refused_as_a_whole(samples: list[dict[str, object]]) -> None:
    world = World()
    lost = world.add_samples(PROMPT, samples)
    world.step()
    assert world.finished == dict.fromkeys(lost, "error")
    assert not world.engine.has_work() and not world.scheduler._live and world.runner.num_rows == 0


@pytest.mark.parametrize("bad", [NUM_TOKENS, 2**31 - 1, -1])
@pytest.mark.parametrize("where", ["prompt", "stop_token_ids", "logit_bias"])
def test_an_id_without_a_row_ends_its_sequence_and_no_other(where: str, bad: int) -> None:
    """The API process refuses it; should it come through, no step may see it."""
    world = World()
    well = world.add(PROMPT)
    world.step()
    params: dict[str, Any] = {"stop_token_ids": (STOP, bad)} if where == "stop_token_ids" else {}
    lost = world.add(
        [*PROMPT, bad] if where == "prompt" else PROMPT,
        **params,
        logit_bias={2: 0.0, bad: 1.0} if where == "logit_bias" else {},
    )
    num_rows = world.runner.num_rows
    world.step()
    assert world.finished[lost] == "error" and not world.tokens[lost]
    assert world.runner.num_rows <= num_rows + 1
    world.drain()
    assert (world.tokens[well], world.finished[well]) == expected(*world.prompts[well])
    assert world.blocks.num_free == world.blocks.num_blocks and not world.scheduler._live


def test_logprobs_of_a_prompt_are_computed_beside_a_cache_that_has_it() -> None:
    world = World(budget=8)
    prompt = [1 + i % 7 for i in range(30)]
    world.add(prompt, max_tokens=1)
    world.drain()
    world.add_samples(prompt, [{"prompt_logprobs": 2, "max_tokens": 0}, {"max_tokens": 3, "seed": 5}])
    world.drain()
    world.check()
    cached = {i: num for output in world.outputs for i, num in output.cached_tokens.items()}
    assert cached == {1: 0, 2: 0, 3: 28}


def test_preemption_neither_loses_logprobs_of_a_prompt_nor_tells_them_twice() -> None:
    for lookahead in (0, 1):
        world = World(lookahead, num_blocks=12, budget=10, caching=False)
        for i in range(4):
            world.add([1 + (i + k) % 7 for k in range(15)], prompt_logprobs=0, max_tokens=12, stop_token_ids=())
        world.drain()
        world.check()
        assert world.scheduler.counters.preemptions


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_draft_model_that_is_right_fills_the_rows_of_a_step(lookahead: int, ahead: int) -> None:
    """`ahead`: an EAGLE-3 head, which computes every token anew that it has guessed."""
    drafter = ToyDrafter(4, ahead=ahead)
    world = World(lookahead, draft_rows=8, row_cost=0.02, drafts="none", num_blocks=200, drafter=drafter)
    world.add(PROMPT * 10, max_tokens=200, stop_token_ids=(), seed=3)
    world.drain()
    world.check()
    assert world.runner.num_launches < 45, "some seven tokens a step"
    most = 2 * world.runner.num_launches if not ahead else 50 + 220
    assert drafter.num_rows < 50 + most, "its prompt once, then a row or two a draft"


def test_a_draft_model_that_is_always_wrong_is_asked_less_and_less() -> None:
    drafter = ToyDrafter(4, right=0.0)
    world = World(draft_rows=8, row_cost=0.05, wait_cost=0.1, drafts="none", num_blocks=1000, drafter=drafter)
    for seed in range(4):
        world.add(PROMPT, max_tokens=400, stop_token_ids=(), seed=seed)
        world.drain()
    world.check()
    assert drafter.num_steps < 0.2 * world.runner.num_launches, "with what is computed for it, 0.2 of a step each"


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_draft_model_finds_what_it_computed_for_the_same_prefix(ahead: int) -> None:
    drafter = ToyDrafter(4, max_rows=1000, ahead=ahead)
    world = World(draft_rows=8, row_cost=0.02, drafts="none", num_blocks=200, drafter=drafter)
    for _ in range(2):
        rows = drafter.num_rows
        world.add(PROMPT * 10, max_tokens=20, stop_token_ids=(), seed=len(world.prompts))
        world.drain()
    world.check()
    assert drafter.num_rows - rows < 35, "of 50 tokens 48 were there"


def test_texts_that_part_right_behind_a_block_do_not_have_its_last_place_in_common() -> None:
    """Of an EAGLE-3 head, which has seen the token behind: the block is computed again, and no further one is stale."""
    drafter = ToyDrafter(4, max_rows=1000, ahead=1)
    world = World(draft_rows=8, row_cost=0.02, drafts="none", num_blocks=200, drafter=drafter)
    for behind in (1, 2, 1, 3):
        world.add(PROMPT * 8 + [behind] * 3, max_tokens=30, stop_token_ids=(), seed=7)
        world.drain()
    world.check()
    assert world.scheduler.counters.accepted_tokens > 60


def test_a_long_prompt_is_read_by_a_draft_model_in_parts() -> None:
    drafter = ToyDrafter(4, max_rows=16)
    world = World(draft_rows=8, row_cost=0.02, drafts="none", num_blocks=400, budget=500, drafter=drafter)
    world.add(PROMPT * 60, max_tokens=300, stop_token_ids=(), seed=1)
    world.drain()
    world.check()
    assert world.scheduler.counters.accepted_tokens > 200 and world.drafted[1][0] > 200


def test_no_draft_model_reads_a_long_prompt_for_a_few_tokens() -> None:
    drafter = ToyDrafter(4, max_rows=1000)
    drafter.row_cost = 0.01
    world = World(draft_rows=8, row_cost=0.02, drafts="none", num_blocks=400, budget=500, drafter=drafter)
    world.add(PROMPT * 100, max_tokens=4, stop_token_ids=(), seed=1)
    world.drain()
    world.check()
    assert not drafter.num_rows, "500 rows cost as much as five tokens"


def test_texts_and_a_draft_model_draft_beside_each_other() -> None:
    """Who repeats itself is drafted for from its text, at no cost; who does not, by the model."""
    drafter = ToyDrafter(4)
    world = World(draft_rows=8, row_cost=0.02, drafts="truth", num_blocks=400, drafter=drafter)
    world.add(PROMPT, max_tokens=200, stop_token_ids=(), seed=1)
    world.drain()
    world.check()
    assert drafter.num_steps < 30 and world.scheduler.counters.accepted_tokens > 150
