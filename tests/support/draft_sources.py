"""Sources of drafts that know everything, nothing, or cannot make up their mind."""

from __future__ import annotations

import random
from collections.abc import Callable

from gptq_api.scheduler.drafts import LONGEST_MATCH, Guess
from gptq_api.scheduler.sequence import Sequence


class Truth:
    """Guesses what will come. `next_token`: of a sequence with these tokens, -1: none."""

    def __init__(self, next_token: Callable[[Sequence, list[int]], int]) -> None:
        self._next_token = next_token
        self.num_ended = 0

    def guess(self, seq: Sequence, most: int) -> Guess | None:
        tokens = list(seq.token_ids)
        while len(tokens) < len(seq.token_ids) + most and (token := self._next_token(seq, tokens)) >= 0:
            tokens.append(token)
        following = tokens[len(seq.token_ids) :]
        return Guess(following, LONGEST_MATCH, "truth") if following else None

    def ended(self, seq: Sequence) -> None:
        self.num_ended += 1


class Garbage:
    """Any tokens, and sure of them."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size, self._rng = vocab_size, random.Random(3)

    def guess(self, seq: Sequence, most: int) -> Guess | None:
        return Guess([self._rng.randrange(self._vocab_size) for _ in range(most)], LONGEST_MATCH, "garbage")

    def ended(self, seq: Sequence) -> None:
        pass


class Silent:
    """Has no idea."""

    def guess(self, seq: Sequence, most: int) -> Guess | None:
        return None

    def ended(self, seq: Sequence) -> None:
        pass


class Fickle:
    """Now the truth, now garbage, now the one and then the other, now nothing; of any length."""

    def __init__(self, truth: Truth, garbage: Garbage) -> None:
        self._truth, self._garbage, self._rng = truth, garbage, random.Random(4)

    def guess(self, seq: Sequence, most: int) -> Guess | None:
        right, wrong = self._truth.guess(seq, most), self._garbage.guess(seq, most)
        if right is None or wrong is None or self._rng.random() < 0.2:
            return None
        cut, end = self._rng.randrange(most + 1), self._rng.randrange(1, most + 1)
        tokens = (right.tokens[:cut] + wrong.tokens[cut:])[:end]
        match = self._rng.randrange(LONGEST_MATCH + 1)
        return Guess(tokens, match, self._rng.choice(["text", "past", "prediction"])) if tokens else None

    def ended(self, seq: Sequence) -> None:
        self._truth.ended(seq)
