"""Which rows of one sequence share a reading of its cache in decode attention.

An item of the kernel (ext/attention/) has the eight columns of a tensor core product: the query heads that share a key
head, of as many rows as fit. Each row keeps the bits that it has alone as long as the steps of 128 tokens, and the
chunks of steps, begin for it where they would then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

# Those of ext/attention/attention_decode_schedule.cuh.
COLUMNS = 8
STEP_TOKENS = 128
MAX_CHUNKS = 32
MAX_NEW_ROWS = 8
"""of a step in which the kernel also writes keys and values"""


@dataclass(frozen=True)
class RowGroups:
    """How rows are grouped for a model."""

    most: int = 1
    """rows of a group"""
    windows: tuple[int | None, ...] = (None,)
    """that its layers have: one grouping serves them all"""

    @classmethod
    def for_heads(cls, num_heads: int, num_kv_heads: int, windows: Iterable[int | None]) -> RowGroups:
        heads = num_heads // num_kv_heads
        parts = -(-heads // COLUMNS)
        return cls(COLUMNS // -(-heads // parts), tuple(dict.fromkeys(windows)))

    def of(self, contexts: Sequence[int], ranks: Sequence[int]) -> list[tuple[int, int]]:
        """For each row (rows of the group that begins with it, new rows of its sequence up to the group's last one),
        and (0, 0) for those that belong to a group before them. In plain Python: rows are few, and a device waits.

        contexts: tokens that each row sees, itself included (at least one); ranks: of the row among the new ones of its
        sequence, from 0.
        """
        groups: list[tuple[int, int]] = []
        first, cut = 0, None
        for context, rank in zip(contexts, ranks, strict=True):
            before, cut = cut, self._cut(context)
            if rank % self.most == 0 or cut != before:
                first = len(groups)
                groups.append((1, rank + 1))
            else:
                groups[first] = (groups[first][0] + 1, rank + 1)
                groups.append((0, 0))
        return groups

    def of_sequence(self, context: int, num: int) -> Sequence[tuple[int, int]]:
        """The same for `num` rows of one sequence, of which the first sees `context` tokens."""
        if self._cut(context) == self._cut(context + num - 1):  # and so is that of each row between
            return _undivided(num, self.most)
        return self.of(range(context, context + num), range(num))

    def _cut(self, context: int) -> list[tuple[int, int]]:
        return [_cut(context, window) for window in self.windows]


@cache
def _undivided(num: int, most: int) -> list[tuple[int, int]]:
    """For rows that all have the same cuts."""
    return RowGroups(most).of([1] * num, range(num))


def _cut(context: int, window: int | None) -> tuple[int, int]:
    """Where a row's first step is, and how often the steps of a chunk double until there are MAX_CHUNKS at most."""
    first = 0 if window is None else max(0, context - window) // STEP_TOKENS
    return first, (((context - 1) // STEP_TOKENS - first) // MAX_CHUNKS).bit_length()
