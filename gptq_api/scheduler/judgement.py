"""How good guesses are: what is likely to be right, by what was.

How often is asked of each source for each length of match: two tokens in common mean little, and whoever is copying has
sixteen. A draft of k tokens meets longer and longer matches, if it is right. Of a draft model it is asked for each
place of a draft. Each sequence has its own numbers, which begin as those of all sequences before it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from gptq_api.scheduler.drafts import LONGEST_MATCH, PREDICTION, Guess
from gptq_api.scheduler.sequence import Sequence

_CLASSES = (0, 1, 2, 3, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 6, 6, 7)
"""by the length of the match: lengths that are counted together"""
_FIRST_RATES = (0.7, 0.5, 0.3, 0.45, 0.6, 0.7, 0.8, 0.85)
"""how often a token of each class is taken to be right before any was seen"""
_FIRST_RATES_OF_PREDICTIONS = (0.8, 0.8, 0.6, 0.7, 0.8, 0.8, 0.85, 0.9)
MODEL = "model"
"""the source that is a draft model; its classes are places of a draft, counted where all before them were right"""
_FIRST_RATE_OF_MODEL = 0.7
_WEIGHT_OF_FIRST = 5.0
"""tokens that this is worth; and what is known of all sequences, beside a sequence's own"""
_WEIGHT_OF_ALL = 8.0
_KEPT = 0.97
"""of a sequence's counts, with each token; and of those of all"""
_KEPT_OF_ALL = 0.998


class Rates:
    """How many guessed tokens were right, of those with a match of each length; the last ones count most."""

    __slots__ = ("_right", "_seen", "kept")

    def __init__(self, kept: float) -> None:
        self.kept = kept
        self._right = [0.0] * len(_FIRST_RATES)
        self._seen = [0.0] * len(_FIRST_RATES)

    def count(self, index: int, right: bool) -> None:
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
    of_model: list[int] = field(default_factory=list)
    """what the draft model guessed, and where the first of it would stand"""
    place_of_model: int = -1
    drafted_by: str = ""
    """the source of the tokens that were drafted last"""
    drafted: Tally = field(default_factory=Tally)
    predicted: Tally = field(default_factory=Tally)
    """the part of them that its prediction suggested"""

    @property
    def is_guessed(self) -> bool:
        """Whether there is something to learn from the next token."""
        return self.guess is not None or bool(self.of_model)


class Judgement:
    """Of all sequences."""

    def __init__(self, max_rows: int) -> None:
        """`max_rows`: of a step, so that no guess is longer."""
        self._max_rows = max_rows
        self._all = defaultdict[str, Rates](lambda: Rates(_KEPT_OF_ALL))

    def chances(self, drafting: Drafting, guess: Guess, most: int) -> list[float]:
        """That the tokens of a guess from texts up to each are all right; of `most` of them."""
        own, everybody = drafting.rates.get(guess.source), self._all[guess.source]
        chances, chance = list[float](), 1.0
        first = _FIRST_RATES_OF_PREDICTIONS if guess.source == PREDICTION else _FIRST_RATES
        before, rate = -1, 0.0
        for match in range(guess.match, guess.match + min(most, len(guess.tokens))):
            index = _CLASSES[min(match, LONGEST_MATCH)]
            if index != before:  # of those who copy all are of the last class
                before, rate = index, everybody.rate(index, first[index], _WEIGHT_OF_FIRST)
                if own is not None:
                    rate = own.rate(index, rate, _WEIGHT_OF_ALL)
            chance *= rate
            chances.append(chance)
        return chances

    def chances_of_model(self, drafting: Drafting, most: int) -> list[float]:
        """The same of what a draft model would say."""
        own, everybody = drafting.rates.get(MODEL), self._all[MODEL]
        chances, chance = list[float](), 1.0
        for index in range(min(most, len(_FIRST_RATES))):
            rate = everybody.rate(index, _FIRST_RATE_OF_MODEL, _WEIGHT_OF_FIRST)
            chance *= rate if own is None else own.rate(index, rate, _WEIGHT_OF_ALL)
            chances.append(chance)
        return chances

    def learn(self, seq: Sequence, num_before: int, num_drafted: int, num_accepted: int) -> None:
        """The sequence has got tokens, from place `num_before` on: was the guess right? `num_accepted` of them had been
        drafted, among `num_drafted`."""
        drafting = seq.drafting
        if drafting is None or not drafting.is_guessed:
            return
        drafting.drafted.add(num_drafted, num_accepted)
        guess, drafting.guess = drafting.guess, None
        of_model, drafting.of_model = drafting.of_model, []
        if len(seq.token_ids) == num_before:
            return
        following = seq.token_ids[num_before : num_before + self._max_rows]
        if of_model and drafting.place_of_model == num_before:
            self._count(drafting, MODEL, of_model, following, range(len(_FIRST_RATES)))
        if guess is not None and drafting.place == num_before:
            if guess.source == PREDICTION == drafting.drafted_by:
                drafting.predicted.add(num_drafted, num_accepted)
            classes = [_CLASSES[min(guess.match + i, LONGEST_MATCH)] for i in range(len(guess.tokens))]
            self._count(drafting, guess.source, guess.tokens, following, classes)

    def _count(
        self, drafting: Drafting, source: str, guess: list[int], following: list[int], classes: Iterable[int]
    ) -> None:
        """How far a guess was right."""
        own = drafting.rates.get(source)
        if own is None:
            own = drafting.rates[source] = Rates(_KEPT)
        everybody = self._all[source]
        for guessed, token, index in zip(guess, following, classes, strict=False):
            right = guessed == token
            own.count(index, right)
            everybody.count(index, right)
            if not right:
                break


def drafting_of(seq: Sequence) -> Drafting:
    """What is known of it."""
    if seq.drafting is None:
        seq.drafting = Drafting()
    return seq.drafting
