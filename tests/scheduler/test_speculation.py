"""How much is drafted for whom: as much as pays, by what was right so far."""

from __future__ import annotations

import random

import pytest

from gptq_api.scheduler.drafts import LONGEST_MATCH, Guess
from gptq_api.scheduler.judgement import Tally
from gptq_api.scheduler.sequence import Sequence
from gptq_api.scheduler.speculation import Speculation, speculation_of
from gptq_api.types import SamplingParams
from tests.support.draft_sources import Garbage, Truth
from tests.support.toy_runner import ToyRunner


def sequence(prompt: list[int] | None = None, *, max_tokens: int = 1000, grammar: str = "") -> Sequence:
    return Sequence(1, prompt or [1, 2, 3], SamplingParams(max_tokens=max_tokens, grammar=grammar))


def counting(seq: Sequence, tokens: list[int]) -> int:
    """Each token is one more than the one before it."""
    return tokens[-1] + 1


class Fixed:
    """The same guess each time."""

    def __init__(self, guess: Guess | None) -> None:
        self._guess = guess

    def guess(self, seq: Sequence, most: int) -> Guess | None:
        return self._guess

    def ended(self, seq: Sequence) -> None:
        pass


def run(speculation: Speculation, seq: Sequence, tokens: list[int]) -> list[int]:
    """The sequence gets these, as many in a step as drafts are right; how many were drafted in each step."""
    drafted, place = [], 0
    while place < len(tokens):
        drafts = speculation.drafts([seq], 100).get(seq, [])
        num = 1
        while num <= len(drafts) and place + num < len(tokens) and drafts[num - 1] == tokens[place + num - 1]:
            num += 1
        before = len(seq.token_ids)
        for token in tokens[place : place + num]:
            seq.append(token)
        speculation.learn(seq, before, len(drafts), num - 1)
        drafted.append(len(drafts))
        place += num
    return drafted


def test_the_truth_is_drafted_as_far_as_rows_go() -> None:
    seq = sequence()
    speculation = Speculation(Truth(counting), 8, 0.1)
    drafted = run(speculation, seq, list(range(4, 204)))
    assert drafted[5:-1] == [7] * len(drafted[5:-1]) and len(drafted) < 30
    assert seq.drafting is not None
    assert seq.drafting.drafted == Tally(sum(drafted), 200 - len(drafted))


def test_garbage_is_given_up_and_tried_no_more() -> None:
    speculation = Speculation(Garbage(1000), 8, 0.1)
    drafted = run(speculation, sequence(), list(range(300)))
    assert sum(drafted[30:]) == 0 and sum(map(bool, drafted)) < 20
    assert sum(run(speculation, sequence(), list(range(100)))) == 0, "the next sequence begins with what is known"


def test_what_becomes_right_is_noticed_without_a_try() -> None:
    speculation = Speculation(Truth(counting), 8, 0.1)
    seq = sequence()
    noise = [random.Random(0).randrange(5000, 9000) for _ in range(200)]
    assert sum(run(speculation, seq, noise)[100:]) == 0
    drafted = run(speculation, seq, list(range(noise[-1] + 1, noise[-1] + 200)))
    assert 7 in drafted[:60]


@pytest.mark.parametrize("row_cost", [0.02, 0.17, 0.3, 0.6])
def test_less_is_drafted_where_rows_cost_more(row_cost: float) -> None:
    """Of guesses of which seven of ten tokens are right."""
    rng, counts = random.Random(5), []
    speculation = Speculation(Truth(counting), 8, row_cost)
    for _ in range(20):
        seq, tokens = sequence(), [4]
        while len(tokens) < 100:
            tokens.append(tokens[-1] + (1 if rng.random() < 0.7 else 5))
        counts += run(speculation, seq, tokens)
    half = counts[len(counts) // 2 :]
    mean = sum(half) / len(half)
    low, high = {0.02: (4.5, 7.0), 0.17: (1.5, 4.0), 0.3: (0.8, 2.2), 0.6: (0.0, 1.0)}[row_cost]
    assert low <= mean <= high


def test_the_likelier_draft_gets_the_rows() -> None:
    sure, unsure = sequence([1, 2, 3]), sequence([4, 5, 6])
    guesses = {sure: Guess([7] * 8, LONGEST_MATCH, "text"), unsure: Guess([8] * 8, 2, "text")}

    class Both:
        def guess(self, seq: Sequence, most: int) -> Guess | None:
            return guesses[seq]

        def ended(self, seq: Sequence) -> None:
            pass

    drafts = Speculation(Both(), 8, 0.0).drafts([unsure, sure], 100)
    assert sum(map(len, drafts.values())) == 6 and len(drafts[sure]) > len(drafts.get(unsure, []))


def test_where_nothing_is_drafted() -> None:
    guess = Guess([7] * 8, LONGEST_MATCH, "text")
    speculation = Speculation(Fixed(guess), 8, 0.0)
    few = [sequence() for _ in range(4)]
    assert sum(map(len, speculation.drafts(few, 100).values())) == 4, "eight rows in all"
    assert [speculation.takes(num) for num in range(6)] == [False, True, True, True, True, False], "of many, none"
    assert not speculation.drafts([sequence(), sequence(grammar="{}")], 100)
    assert not speculation.drafts([sequence(max_tokens=1)], 100)
    assert speculation.drafts([one := sequence(max_tokens=3)], 100) == {one: [7, 7]}
    assert speculation.drafts([one := sequence()], 3) == {one: [7, 7]}
    assert not speculation.drafts([sequence()], 1)
    assert not Speculation(Fixed(None), 8, 0.0).drafts([sequence()], 100)
    assert not Speculation(Fixed(guess), 8, 5.0).drafts([sequence()], 100), "rows cost more than they bring"
    assert not Speculation(Fixed(guess), 8, 0.01, wait_cost=9.0).drafts([sequence()], 100)
    assert speculation_of("off", ToyRunner(1, 4, 8, max_draft_rows=8)) is None
    assert speculation_of("auto", ToyRunner(1, 4, 8)) is None


def test_a_row_costs_more_behind_a_long_context() -> None:
    guess = Guess([7] * 8, LONGEST_MATCH, "text")
    speculation = Speculation(Fixed(guess), 8, 0.02, context_cost=1e-3)
    short, long = sequence([5] * 100), sequence([5] * 3000)
    assert len(speculation.drafts([short], 100)[short]) == 7 and not speculation.drafts([long], 100)


def test_waiting_for_a_token_pays_where_more_than_that_is_likely() -> None:
    def waits(guess: Guess | None, wait_cost: float = 0.1, in_flight: int = 1, max_tokens: int = 1000) -> bool:
        seq = sequence(max_tokens=max_tokens)
        seq.num_tokens_in_flight = in_flight
        return Speculation(Fixed(guess), 8, 0.02, wait_cost).had_better_wait([seq])

    sure, unsure = Guess([7] * 8, LONGEST_MATCH, "text"), Guess([7] * 8, 2, "text")
    assert waits(sure) and not waits(sure, wait_cost=20) and not waits(None)
    assert waits(unsure) and not waits(unsure, wait_cost=0.5)
    assert not waits(Guess([7], LONGEST_MATCH, "text")), "it is the token in flight"
    assert not waits(sure, max_tokens=2), "the step after it brings the last token"


def test_a_text_that_repeats_nothing_is_hardly_ever_waited_for() -> None:
    rng = random.Random(6)
    speculation = speculation_of("auto", ToyRunner(1, 4, 8, max_draft_rows=8))
    assert speculation is not None
    waited = 0
    for _ in range(10):
        seq = sequence([rng.randrange(100) for _ in range(200)])  # many pairs stood there before, by chance
        seq.num_tokens_in_flight = 1
        for _ in range(300):
            waited += speculation.had_better_wait([seq])
            seq.append(rng.randrange(100))
            speculation.learn(seq, len(seq.token_ids) - 1, 0, 0)
    assert waited < 3000 / 100
