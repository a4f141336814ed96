"""What may come next in a text, guessed from texts: its own, what the client predicted, past answers.

A text that ends as another one went on before is likely to go on like it. `Pairs` finds where in a text its last two
tokens stood before, in a few microseconds however long it is; of the places it looks at the one counts that has most
tokens in common with the end, which also says how far to trust it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Protocol

from gptq_api.scheduler.sequence import Sequence

PREDICTION = "prediction"
"""the source of what the client said"""
LONGEST_MATCH = 16
"""tokens that are compared; a longer match is no surer"""
_MOST_PLACES = 24
"""that are looked at for one guess, the last ones first"""
_END = -1
"""behind each past answer: no token"""
_CATCH_UP = 4096
"""tokens of a text that are taken in for one guess: a millisecond. Of a longer prompt nothing is guessed before."""


@dataclass(slots=True, frozen=True)
class Guess:
    """How a text may go on."""

    tokens: list[int]
    """in their order, at least one"""
    match: int
    """how many tokens of the text's end stood before these where they were found; 0: nothing was compared"""
    source: str
    """who guessed: each is right as often as it is right"""


class DraftSource(Protocol):
    """Guesses. It may be wrong, and may say another thing each time."""

    def guess(self, seq: Sequence, most: int) -> Guess | None:
        """How the known tokens of a sequence that decodes may go on; `most` tokens."""

    def ended(self, seq: Sequence) -> None:
        """A sequence that guesses may have been asked for has all its tokens, or is gone."""


class Pairs:
    """Where in a growing text each pair of tokens ends."""

    __slots__ = ("_before", "_last", "num_tokens")

    def __init__(self) -> None:
        self.num_tokens = 1
        """how far the text has been taken in: as a second token of pairs"""
        self._last: dict[int, int] = {}
        self._before = array("i", [-1])  # by the place of a pair's second token: of the same pair before it, -1: none

    def take_in(self, tokens: list[int]) -> bool:
        """The text's pairs but for the last one, which nothing follows. False: it is long, and they are not all there
        yet."""
        start, end = self.num_tokens, len(tokens) - 1
        if start >= end:
            return True
        last, before = self._last, self._before
        reached = min(end, start + _CATCH_UP)
        for i in range(start, reached):
            pair = tokens[i - 1] << 32 | tokens[i]
            before.append(last.get(pair, -1))
            last[pair] = i
        self.num_tokens = reached
        return reached == end

    def find(self, tokens: list[int], ending: list[int], near: int = 0) -> tuple[int, int]:
        """(how many tokens of `ending` stand there, where it went on) for the place in the text that has most in common
        with `ending`: of several that is `near`, or else the last one. (0, 0): not even two, or the text is long and
        not all there yet."""
        length, most, best, found, left = len(ending), LONGEST_MATCH, 0, near, _MOST_PLACES
        if near:
            limit = min(most, near, length) if near < len(tokens) else 0
            while best < limit and tokens[near - 1 - best] == ending[-1 - best]:
                best += 1
            if best == most:
                return best, found
        end = len(tokens) - 1
        if self.num_tokens == end - 1:  # as `take_in`, for each token of an answer
            pair = tokens[end - 2] << 32 | tokens[end - 1]
            self._before.append(self._last.get(pair, -1))
            self._last[pair] = end - 1
            self.num_tokens = end
        elif self.num_tokens < end and not self.take_in(tokens):
            return 0, 0
        place = self._last.get(ending[-2] << 32 | ending[-1], -1) if length > 1 else -1
        if place < 0:
            return 0, 0
        while place >= 0 and left:
            match, limit = 2, min(most, place + 1, length)
            while match < limit and tokens[place - match] == ending[-1 - match]:
                match += 1
            if match > best:
                best, found = match, place + 1
                if match == most:
                    break
            place, left = self._before[place], left - 1
        return best, found


@dataclass(slots=True)
class _Text:
    tokens: list[int]
    pairs: Pairs = field(default_factory=Pairs)


@dataclass(slots=True)
class Knowledge:
    """Of one sequence."""

    pairs: Pairs = field(default_factory=Pairs)
    """of its own tokens, up to the last but one"""
    prediction: _Text | None = None
    shift: int = 0
    """From the sequence's end to where in its tokens it was found to go on, which stays the same while it copies; 0:
    nowhere. A text may have the same lines many times over: who copies goes on behind those that were copied last."""
    shift_in_prediction: int = 0
    shift_in_past: int = 0


class TextDrafts:
    """Guesses from texts: the longest match counts, and of equal ones a prediction, the sequence's own text, past
    answers of its cache salt, in this order. A prediction that begins like the answer goes before the others, short as
    that may be: somebody said so. Another salt's answers are never looked at: how fast an answer comes would tell what
    others were answered."""

    def __init__(self, past: PastAnswers | None = None) -> None:
        self._past = past

    def guess(self, seq: Sequence, most: int) -> Guess | None:
        known = seq.knowledge
        if known is None:
            known = seq.knowledge = Knowledge(prediction=_Text(seq.prediction) if seq.prediction else None)
        tokens, best, match = seq.token_ids, None, 1
        if known.prediction is not None:
            best = self._predicted(seq, known, known.prediction, most)
            if best is not None:
                if best.match in (LONGEST_MATCH, seq.num_output_tokens):
                    return best
                match = best.match
        num = len(tokens)
        found, place = known.pairs.find(tokens, tokens, num + known.shift if known.shift else 0)
        known.shift = place - num if found else 0
        if found > match:
            following, match = tokens[place : place + most], found
            while len(following) < most:  # what repeats itself goes on repeating itself
                following = (following + following)[:most]
            best = Guess(following, match, "text")
        if self._past is not None and match < LONGEST_MATCH and seq.cache_salt in self._past.texts:
            near = num + known.shift_in_past if known.shift_in_past else 0
            found, place, following = self._past.find(seq.cache_salt, tokens, most, near)
            known.shift_in_past = place - num if found else 0
            if found > match:
                best = Guess(following, found, "past")
        return best

    def _predicted(self, seq: Sequence, known: Knowledge, prediction: _Text, most: int) -> Guess | None:
        num = len(seq.token_ids)
        answer = seq.token_ids[max(seq.num_prompt_tokens, num - LONGEST_MATCH) :]
        match = place = len(answer)
        if match < num - seq.num_prompt_tokens or answer != prediction.tokens[:match]:
            near = num + known.shift_in_prediction if known.shift_in_prediction else 0
            match, place = prediction.pairs.find(prediction.tokens, answer, near)
        known.shift_in_prediction = place - num if place else 0
        following = prediction.tokens[place : place + most] if match or not answer else []
        return Guess(following, match, PREDICTION) if following else None

    def ended(self, seq: Sequence) -> None:
        if self._past is not None:
            self._past.add(seq.cache_salt, seq.token_ids, seq.num_prompt_tokens)
        seq.knowledge = None


class PastAnswers:
    """The last answers of each salt, each with the end of its prompt: as many as memory is given for."""

    def __init__(self, most_tokens: int = 1 << 16, longest: int = 1 << 13) -> None:
        """`most_tokens`: of all salts; some 150 bytes each. `longest`: of one answer; a salt keeps twice as many."""
        self._most_tokens, self._longest = most_tokens, longest
        self.texts: OrderedDict[bytes, _Text] = OrderedDict()  # by salt, the one used longest ago first
        self.num_tokens = 0

    def find(self, salt: bytes, ending: list[int], most: int, near: int = 0) -> tuple[int, int, list[int]]:
        """(how many tokens of `ending` stand before them, where, tokens that followed in an answer); 0: none. `near` is
        that of `Pairs.find`."""
        text = self.texts.get(salt)
        if text is None:
            return 0, 0, []
        match, place = text.pairs.find(text.tokens, ending, near)
        following = text.tokens[place : place + most] if match else []
        if _END in following:
            del following[following.index(_END) :]
        return (match, place, following) if following else (0, 0, [])

    def add(self, salt: bytes, token_ids: list[int], num_prompt_tokens: int) -> None:
        """An answer has ended, or as much of it as there will be."""
        if len(token_ids) - num_prompt_tokens < 2:
            return
        first = max(0, num_prompt_tokens - LONGEST_MATCH)
        answer = token_ids[first : min(len(token_ids), first + self._longest - 1)]
        text = self.texts.setdefault(salt, _Text([]))
        self.texts.move_to_end(salt)
        self.num_tokens -= len(text.tokens)
        if len(text.tokens) + len(answer) + 1 > 2 * self._longest:  # the older half goes
            text = self.texts[salt] = _Text(text.tokens[-self._longest :])
        text.tokens += [*answer, _END]
        self.num_tokens += len(text.tokens)
        while self.num_tokens > self._most_tokens:
            self.num_tokens -= len(self.texts.popitem(last=False)[1].tokens)
