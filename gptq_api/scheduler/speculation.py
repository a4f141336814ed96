"""How many drafted tokens of whom a step computes: as many as pay.

Nothing that is drafted changes a token (`step.Step`), it only costs rows. So what counts is how often a guess is right,
and that is known without computing anything: each sequence that could draft is guessed for in every step, and when its
tokens come they are compared with the guess, whether it was tried or not. A text that repeats nothing costs some
microseconds a step and no row.

How often is asked of each source for each length of match: two tokens in common mean little, and whoever is copying has
sixteen. A draft of k tokens meets longer and longer matches, if it is right. Each sequence has its own numbers, which
begin as those of all sequences before it.

Only few sequences draft: where many decode, their rows are worth more than guesses.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

from gptq_api.scheduler.drafts import LONGEST_MATCH, PREDICTION, DraftSource, Guess, PastAnswers, TextDrafts
from gptq_api.scheduler.sequence import Sequence
from gptq_api.step import Launched, Runner

_MARGIN = 1.03
"""what a step with drafts has to bring more than one without, by the estimate"""
_CLASSES = (0, 1, 2, 3, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 6, 6, 7)
"""by the length of the match: lengths that are counted together"""
_FIRST_RATES = (0.7, 0.5, 0.3, 0.45, 0.6, 0.7, 0.8, 0.85)
"""how often a token of each class is taken to be right before any was seen"""
_FIRST_RATES_OF_PREDICTIONS = (0.8, 0.8, 0.6, 0.7, 0.8, 0.8, 0.85, 0.9)
_WEIGHT_OF_FIRST = 5.0
"""tokens that this is worth; and what is known of all sequences, beside a sequence's own"""
_WEIGHT_OF_ALL = 8.0
_KEPT = 0.97
"""of a sequence's counts, with each token; and of those of all"""
_KEPT_OF_ALL = 0.998


def speculation_of(mode: Literal["off", "auto", "ngram"], runner: Runner[Launched]) -> Speculation | None:
    """What the setting says, for a runner."""
    if mode == "off" or not runner.max_draft_rows:
        return None
    source = TextDrafts(PastAnswers() if mode == "auto" else None)
    return Speculation(source, runner.max_draft_rows, runner.row_cost, runner.wait_cost, runner.context_cost)


class Rates:
    """How many guessed tokens were right, of those with a match of each length; the last ones count most."""

    __slots__ = ("_right", "_seen", "kept")

    def __init__(self, kept: float) -> None:
        self.kept = kept
        self._right = [0.0] * len(_FIRST_RATES)
        self._seen = [0.0] * len(_FIRST_RATES)

    def count(self, match: int, right: bool) -> None:
        index = _CLASSES[match]
        self._right[index] = self._right[index] * self.kept + right
        self._seen[index] = self._seen[index] * self.kept + 1

    def rate(self, index: int, otherwise: float, weight: float) -> float:
        """The share of a class that was right, where `otherwise` counts as much as `weight` tokens."""
        return (self._right[index] + weight * otherwise) / (self._seen[index] + weight)


@dataclass(slots=True)
class Tally:
    """What became of drafted tokens."""

    num: int = 0
    num_accepted: int = 0
    """those that the sequence got"""

    def add(self, num: int, num_accepted: int) -> None:
        self.num += num
        self.num_accepted += num_accepted

    @property
    def told(self) -> tuple[int, int]:
        """(accepted, rejected)."""
        return self.num_accepted, self.num - self.num_accepted


@dataclass(slots=True)
class Drafting:
    """What is known of one sequence."""

    rates: dict[str, Rates] = field(default_factory=dict)
    """by source"""
    guess: Guess | None = None
    place: int = -1
    """where in the sequence its first token would stand"""
    drafted: Tally = field(default_factory=Tally)
    predicted: Tally = field(default_factory=Tally)
    """the part of them that its prediction suggested"""


@dataclass(slots=True)
class _Candidate:
    seq: Sequence
    guess: Guess
    chances: list[float]
    """that the tokens up to this one are all right; as many as may be drafted"""


class Speculation:
    """max_rows, row_cost, wait_cost: the runner's max_draft_rows and the like (step.py)."""

    def __init__(
        self, source: DraftSource, max_rows: int, row_cost: float, wait_cost: float = 0.0, context_cost: float = 0.0
    ) -> None:
        self.source, self._max_rows = source, max_rows
        self._row_cost, self._wait_cost, self._context_cost = row_cost, wait_cost, context_cost
        self._all = defaultdict[str, Rates](lambda: Rates(_KEPT_OF_ALL))

    def takes(self, num_decoding: int) -> bool:
        """Whether so many sequences may draft. Of many a row is worth more than a guess."""
        return 0 < num_decoding <= self._max_rows // 2

    def drafts(self, decoding: list[Sequence], most_rows: int) -> dict[Sequence, list[int]]:
        """What is drafted in a step of at most `most_rows`, in which these sequences decode: as few as `takes` allows,
        whose tokens are all known."""
        candidates = self._candidates(decoding)
        if not candidates:
            return {}
        chosen, gain = self._chosen(candidates, len(decoding), min(most_rows, self._max_rows))
        return chosen if gain > _MARGIN else {}

    def had_better_wait(self, decoding: list[Sequence]) -> bool:
        """Whether the next step of these sequences, some of which have a token in flight, is better chosen when that is
        known: it will probably be what is guessed, and more behind it."""
        candidates = self._candidates(decoding)
        if not candidates:
            return False
        _, gain = self._chosen(candidates, len(decoding), self._max_rows)
        return gain > _MARGIN

    def _candidates(self, decoding: list[Sequence]) -> list[_Candidate]:
        """Of those that are guessed for: none where a step follows a grammar, whose masks are for one row."""
        found: list[_Candidate] = []
        for seq in decoding:
            if seq.params.grammar:
                return []
            drafting = seq.drafting
            if drafting is None:
                drafting = seq.drafting = Drafting()
            place = len(seq.token_ids)
            if drafting.place != place:
                drafting.guess, drafting.place = self.source.guess(seq, self._max_rows), place
            guess = drafting.guess
            if guess is None:
                continue
            in_flight = seq.num_tokens_in_flight
            left = seq.params.max_tokens - seq.num_output_tokens  # a step with k drafts may bring k + 1
            most = min(left - 1, self._max_rows - len(decoding) + in_flight)
            if most > in_flight:
                found.append(_Candidate(seq, guess, self._chances(drafting, guess, most)))
        return found

    def _chances(self, drafting: Drafting, guess: Guess, most: int) -> list[float]:
        own, everybody = drafting.rates.get(guess.source), self._all[guess.source]
        chances, chance = list[float](), 1.0
        first = _FIRST_RATES_OF_PREDICTIONS if guess.source == PREDICTION else _FIRST_RATES
        for match in range(guess.match, guess.match + min(most, len(guess.tokens))):
            index = _CLASSES[min(match, LONGEST_MATCH)]
            rate = everybody.rate(index, first[index], _WEIGHT_OF_FIRST)
            chance *= rate if own is None else own.rate(index, rate, _WEIGHT_OF_ALL)
            chances.append(chance)
        return chances

    def _chosen(
        self, candidates: list[_Candidate], num_decoding: int, most_rows: int
    ) -> tuple[dict[Sequence, list[int]], float]:
        """(the drafts that pay most, how many times as many tokens they bring in the same time).

        Row by row the likeliest goes first, as long as it raises tokens over cost. Of a sequence with a token in flight
        the first guessed one is that; its drafts stand behind it, and take rows only where it is right.
        """
        plain_cost = 1 + self._row_cost * (num_decoding - 1)
        tokens, cost, left = float(num_decoding), plain_cost + self._wait_cost, max(0, most_rows - num_decoding)
        rows = []
        for one in candidates:
            skipped = one.seq.num_tokens_in_flight
            taken_with = one.chances[skipped - 1] if skipped else 1.0
            rows += [(chance / taken_with, chance, taken_with, one) for chance in one.chances[skipped:]]
        rows.sort(key=lambda row: -row[0])
        chosen: dict[Sequence, list[int]] = {}
        for _, chance, taken_with, one in rows[:left]:
            row_cost = (self._row_cost + self._context_cost * len(one.seq.token_ids)) * taken_with
            if chance * cost <= tokens * row_cost:
                break
            tokens, cost = tokens + chance, cost + row_cost
            skipped = one.seq.num_tokens_in_flight
            num = len(chosen.get(one.seq, ()))
            chosen[one.seq] = one.guess.tokens[skipped : skipped + num + 1]
        return chosen, tokens / cost / (num_decoding / plain_cost)

    def learn(self, seq: Sequence, num_before: int, num_drafted: int, num_accepted: int) -> None:
        """The sequence has got tokens, from place `num_before` on: was the guess right? `num_accepted` of them had been
        drafted, among `num_drafted`."""
        drafting = seq.drafting
        if drafting is None or drafting.guess is None:
            return
        drafting.drafted.add(num_drafted, num_accepted)
        guess, drafting.guess = drafting.guess, None
        if drafting.place != num_before or len(seq.token_ids) == num_before:
            return
        if guess.source == PREDICTION:
            drafting.predicted.add(num_drafted, num_accepted)
        own = drafting.rates.get(guess.source)
        if own is None:
            own = drafting.rates[guess.source] = Rates(_KEPT)
        everybody, match = self._all[guess.source], guess.match
        for guessed, token in zip(guess.tokens, seq.token_ids[num_before:], strict=False):
            right = guessed == token
            own.count(match, right)
            everybody.count(match, right)
            if not right:
                break
            match = min(match + 1, LONGEST_MATCH)

    def ended(self, seq: Sequence) -> None:
        """A sequence has finished, or was aborted."""
        self.source.ended(seq)
        seq.drafting = None
