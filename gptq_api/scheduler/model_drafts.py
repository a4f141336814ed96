"""What a draft model has computed of which sequence, and the questions to it.

Its cache has the same blocks as the served model's, but it computes them when it is asked, or never. So each block is
remembered with the hash of what the draft model last filled it with: whoever is given a block with that hash, by prefix
caching, finds the draft model's keys and values there too. Behind that a sequence knows how far they go, guesses
included, which are worth keeping as long as they turn out right.

The last place of a block that an EAGLE-3 head filled is of the first token behind it too, and is remembered with that.
Two texts that part there share the place, which is then of whoever was computed last: a worse guess, and no more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gptq_api.scheduler.sequence import Sequence
from gptq_api.step import DeviceMemoryError, Drafter, DraftRequest


@dataclass(slots=True)
class DraftCache:
    """Of one sequence with one block table."""

    key: int
    num_computed: int
    """known tokens whose K/V are there"""
    num_noted: int
    """blocks of them whose content is remembered"""
    guessed: list[int] = field(default_factory=list)
    """tokens computed behind them, if they come"""
    is_over: bool = False
    """nothing more is asked: it has a token that the draft model has no row for, or there was no memory"""


class ModelDrafts:
    def __init__(self, drafter: Drafter, vocab_size: int, block_size: int) -> None:
        """`vocab_size`: of the served model, which takes no other ids."""
        self.drafter, self._vocab_size, self._block_size = drafter, vocab_size, block_size
        self._ahead = drafter.ahead
        self._filled: dict[int, bytes] = {}  # by block: the hash of the content that the draft model has there
        self._num_keys = 0

    def most(self, seq: Sequence, num_tokens: int) -> int:
        """How many tokens could be guessed for it, once it has so many."""
        cache = seq.draft_cache
        return 0 if cache is not None and cache.is_over else max(0, self.drafter.max_model_len - num_tokens)

    def num_missing(self, seq: Sequence) -> int:
        """Known tokens to compute before the first guess, the last one included, which always is."""
        return len(seq.token_ids) - self._computed(seq)

    def draft(self, wanted: dict[Sequence, int]) -> dict[Sequence, list[int]]:
        """So many tokens for each. Their block tables have to be long enough for the known tokens and these. None for
        whom too many tokens are missing: some of them are computed now, and the rest when they are asked for again."""
        requests, asked, left = list[DraftRequest](), list[Sequence](), self.drafter.max_rows
        for seq, num in wanted.items():
            if len(requests) == self.drafter.max_seqs or not left:
                break
            start, length = self._computed(seq), len(seq.token_ids)
            cache = seq.draft_cache
            assert cache is not None
            if any(token >= self.drafter.vocab_size for token in seq.token_ids[start:]):
                cache.is_over = True
                continue
            end = min(length, start + left)
            left -= end - start
            num = num if end == length else 0
            prompt, table = seq.num_prompt_tokens, seq.block_table
            requests.append(DraftRequest(cache.key, seq.token_ids, prompt, seq.params, table, start, end - start, num))
            asked.append(seq)
            self._written(seq, cache, start, end, max(0, num - 1))
        if not requests:
            return {}
        try:
            found = self.drafter.draft(requests)
        except DeviceMemoryError:
            for seq in asked:
                self._forget(seq)
            return {}
        guesses = dict[Sequence, list[int]]()
        for seq, request, tokens in zip(asked, requests, found, strict=True):
            assert seq.draft_cache is not None
            seq.draft_cache.guessed = [] if self._ahead else tokens[:-1]
            if request.num_drafts and not tokens:  # not finite
                self._forget(seq)
            most = next((i for i, token in enumerate(tokens) if token >= self._vocab_size), len(tokens))
            if most:
                guesses[seq] = tokens[:most]
        return guesses

    def _computed(self, seq: Sequence) -> int:
        """Known tokens with K/V there, all but the last one at most: it has to be computed for what follows it."""
        cache, tokens = seq.draft_cache, seq.token_ids
        if cache is None:
            cache = seq.draft_cache = self._of_blocks(seq)
        num = cache.num_computed
        if cache.guessed and num < len(tokens):
            for guess in cache.guessed:
                if num == len(tokens) or tokens[num] != guess:
                    break
                num += 1
            del cache.guessed[: num - cache.num_computed]
            if num < len(tokens):  # the next one was wrong, or there is none
                cache.guessed.clear()
            cache.num_computed = num
        self._note(seq, cache)
        return min(num, len(tokens) - 1)

    def _of_blocks(self, seq: Sequence) -> DraftCache:
        """Of a sequence that has just got its blocks: it may share some that are filled."""
        num = 0
        for i, block in enumerate(seq.block_table[: self._num_named(seq, len(seq.token_ids))]):
            if self._filled.get(block) != self._content(seq, i):
                break
            num += 1
        self._num_keys += 1
        return DraftCache(self._num_keys, num * self._block_size + (self._ahead if num else 0), num)

    def _num_named(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks that these tokens fill and whose content has a name."""
        return max(0, min((num_tokens - self._ahead) // self._block_size, len(seq.block_hashes)))

    def _content(self, seq: Sequence, i: int) -> bytes:
        """The name of what is in a sequence's block i when it is full."""
        if not self._ahead:
            return seq.block_hashes[i]
        return seq.block_hashes[i] + seq.token_ids[(i + 1) * self._block_size].to_bytes(4, "little")

    def _written(self, seq: Sequence, cache: DraftCache, start: int, end: int, num_guesses: int) -> None:
        """Tokens from `start` to `end` are being computed, and guesses behind them."""
        first = max(0, start - self._ahead) // self._block_size
        for block in seq.block_table[first : -(-(end + num_guesses) // self._block_size)]:
            self._filled.pop(block, None)
        cache.num_computed, cache.num_noted = end, min(cache.num_noted, first)
        cache.guessed = []
        self._note(seq, cache)

    def _note(self, seq: Sequence, cache: DraftCache) -> None:
        """Remember what is in the blocks that are full, as far as the scheduler has named it."""
        last = self._num_named(seq, cache.num_computed)
        for i in range(cache.num_noted, last):
            self._filled[seq.block_table[i]] = self._content(seq, i)
        cache.num_noted = max(cache.num_noted, last)

    def _forget(self, seq: Sequence) -> None:
        """What is in its blocks is not known any more."""
        assert seq.draft_cache is not None
        seq.draft_cache.is_over = True
        for block in seq.block_table:
            self._filled.pop(block, None)
