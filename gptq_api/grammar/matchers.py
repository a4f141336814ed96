"""Grammars in the engine process: where each constrained sequence stands in its own, and what it may say next.

A matcher belongs to a seat from the admission on. A step remembers the matchers of its own entries, since a seat may
have been given on by the time that its tokens are known.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray

from gptq_api.grammar.compile import limits
from gptq_api.step import Masks, Step
from gptq_api.types import SamplingParams

Compiled = LLMatcher | str
"""a grammar that is not begun, or why there is none"""
_MAX_COMPILED = 32
"""grammars kept, besides those of running sequences"""


@dataclass(slots=True, eq=False)
class _Follower:
    """A sequence in its grammar."""

    matcher: LLMatcher
    num_prompt_tokens: int
    min_tokens: int
    ends: frozenset[int]
    """the tokens that end the sequence and say nothing"""
    end_bits: list[tuple[int, np.uint32]]
    """where these stand in a mask"""


@dataclass(slots=True, frozen=True)
class Constrained:
    """An entry of a step."""

    entry: int
    num_output_tokens: int
    """before the token that the step samples"""
    follower: _Follower


class Grammars:
    """Not thread-safe, but for what `compile` does in threads of its own."""

    def __init__(self, vocabulary: Callable[[], LLTokenizer], vocab_size: int) -> None:
        """`vocabulary` is called once, with the first grammar; `vocab_size`: rows of the logits."""
        self._make_vocabulary, self._vocab_size = vocabulary, vocab_size
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._followers: dict[int, _Follower] = {}  # by seat
        # One thread: the vocabulary is built once, and a crowd of new grammars does not take the engine's cores.
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        return self._make_vocabulary()

    @cached_property
    def _end_bits(self) -> list[tuple[int, np.uint32]]:
        return _bits(self._vocabulary.eos_tokens)

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()

    def has(self, grammar: str) -> bool:
        """Whether it is compiled."""
        return grammar in self._compiled

    def prepare(self) -> None:
        """Build the vocabulary in another thread, before the first grammar needs it."""
        self._threads.submit(lambda: self._vocabulary)

    def compile(self, grammar: str, done: Callable[[str, Compiled], None]) -> None:
        """In another thread, from which `done` is called; the caller's thread passes what it got to `keep`. It takes
        from 1 ms to some 50."""
        self._threads.submit(lambda: done(grammar, self.compiled_now(grammar)))

    def keep(self, grammar: str, compiled: Compiled) -> str:
        """Why it cannot be used; "" where it can."""
        if isinstance(compiled, str):
            return compiled
        self._compiled[grammar] = compiled
        while len(self._compiled) > _MAX_COMPILED:
            self._compiled.popitem(last=False)
        return ""

    def compiled_now(self, grammar: str) -> Compiled:
        """Compiled in the thread of the caller, for `keep`."""
        try:
            matcher = LLMatcher(self._vocabulary, grammar, limits=limits(), log_level=0)
            matcher.compute_bitmask()  # what is built lazily is built with the first mask; copies share it
        except Exception as error:  # the tokenizer's files are gone, for one: whoever waits has to be told
            return f"{type(error).__name__}: {error}"
        return matcher.get_error() or matcher

    def of(self, step: Step) -> list[Constrained]:
        """The entries of a launched step that a grammar constrains. Takes in whom the step admits."""
        for new in step.admitted:
            self._followers.pop(new.seat, None)
            if new.params.grammar:
                self._followers[new.seat] = self._follow(new.params, new.token_ids, new.num_prompt_tokens)
        if not self._followers:
            return []
        found = []
        for entry, seat in enumerate(step.seats):
            follower = self._followers.get(seat)
            if follower is not None and step.num_sampled[entry]:
                length = step.num_computed[entry] + step.num_new[entry]
                found.append(Constrained(entry, length - follower.num_prompt_tokens, follower))
        return found

    def _follow(self, params: SamplingParams, token_ids: list[int], num_prompt_tokens: int) -> _Follower:
        compiled = self._compiled.get(params.grammar)
        if compiled is None:  # so many others came since that it was forgotten
            again = self.compiled_now(params.grammar)
            assert not isinstance(again, str), "it did compile once"
            compiled = self._compiled[params.grammar] = again
        self._compiled.move_to_end(params.grammar)
        matcher = compiled.deep_copy()
        matcher.consume_tokens(token_ids[num_prompt_tokens:])  # of one that was preempted
        silent = [i for i in params.stop_token_ids if self._vocabulary.is_special_token(i)]
        return _Follower(matcher, num_prompt_tokens, params.min_tokens, frozenset(silent), _bits(silent))

    def masks(self, rows: Sequence[Constrained]) -> Masks:
        """What each of them may sample; always something. One whose matcher has failed may sample anything: `advance`
        reports it."""
        words = np.zeros((len(rows), -(-self._vocab_size // 32)), np.uint32)
        jobs = [(row.follower.matcher, i) for i, row in enumerate(rows)]
        fill_next_token_bitmask_par(self._executor, jobs, words.view(np.int32))
        for row, mask in zip(rows, words, strict=True):
            self._finish(row, mask)
        return Masks([row.entry for row in rows], words.view(np.int32))

    def _finish(self, row: Constrained, mask: NDArray[np.uint32]) -> None:
        """The ends of this sequence instead of the vocabulary's, where the grammar may end and min_tokens allows it."""
        may_end = False
        for word, bit in self._end_bits:
            may_end = may_end or bool(mask[word] & bit)
            mask[word] &= ~bit
        goes_on = bool(mask.any())
        if may_end and (row.num_output_tokens >= row.follower.min_tokens or not goes_on):
            for word, bit in row.follower.end_bits:
                mask[word] |= bit
        elif not goes_on:
            mask[:] = 0xFFFFFFFF

    def advance(self, rows: Sequence[Constrained], tokens: dict[int, int]) -> dict[int, str]:
        """`tokens`: by entry, what the step sampled. By entry, why the grammar of some of them can not be followed any
        further."""
        failed = {}
        for row in rows:
            token, follower = tokens.get(row.entry, -1), row.follower
            if token < 0 or token in follower.ends:
                continue
            if not follower.matcher.consume_token(token):
                failed[row.entry] = follower.matcher.get_error()
        return failed


def _bits(token_ids: Sequence[int]) -> list[tuple[int, np.uint32]]:
    return [(i >> 5, np.uint32(1 << (i & 31))) for i in token_ids]
