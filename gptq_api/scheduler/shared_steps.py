"""What a step is made of while several owners share it.

A step takes as long as its rows are many, on a CPU nearly in proportion, and whoever comes waits for the step that runs
and for its own. So while there are several owners, and for a while after, a step has no more rows than pay. Each owner
gets the same part of those that decode, or as many as it has, and its sequences take turns. Who is in the background
gets what the others leave.
"""

from __future__ import annotations

from gptq_api.scheduler.sequence import Sequence
from gptq_api.scheduler.shares import in_background

Decoding = list[tuple[Sequence, int]]
"""with the tokens that each has to compute: one"""
SHARED_STEPS = 1000
"""How long it counts as shared after the last owner but one has left: it is likely to come again"""
PROMPT_ROWS = 4
"""of a shared step, for each that may decode: they cost less, since they read one context together"""
BESIDE_PROMPTS = 4
"""Of those that may decode, one in so many does beside prompts: a first token is waited for, the next ones are read"""


class SharedSteps:
    def __init__(self, most: int | None) -> None:
        """`most`: that decode in a shared step; None: as many as there are, and steps are as large as others."""
        self._most = most
        self._num_steps = 0
        self._shared_until = -1

    def begin_step(self, num_owners: int) -> None:
        """`num_owners`: of sequences that wait or run."""
        self._num_steps += 1
        if num_owners > 1:
            self._shared_until = self._num_steps + SHARED_STEPS

    @property
    def _is_shared(self) -> bool:
        return self._num_steps <= self._shared_until

    def most_prompt_tokens(self, otherwise: int) -> int:
        """In this step."""
        return min(otherwise, self._most * PROMPT_ROWS) if self._most is not None and self._is_shared else otherwise

    def chosen(self, decoding: Decoding, *, beside_prompts: bool) -> Decoding:
        """Those of this step, in their order. `beside_prompts`: whether it has, or may have, prompts as well."""
        if self._most is None or not self._is_shared:
            return decoding
        most = max(1, self._most // BESIDE_PROMPTS) if beside_prompts else self._most
        if len(decoding) <= most:
            return decoding
        in_step = _in_turn([seq for seq, _ in decoding if not in_background(seq)], most)
        if (left := most - len(in_step)) > 0:
            in_step |= _in_turn([seq for seq, _ in decoding if in_background(seq)], left)
        for seq in in_step:
            seq.last_turn = self._num_steps
        return [(seq, num) for seq, num in decoding if seq in in_step]


def _in_turn(decoding: list[Sequence], most: int) -> set[Sequence]:
    """So many of these, and one of each owner at least."""
    by_owner: dict[bytes, list[Sequence]] = {}
    for seq in decoding:
        by_owner.setdefault(seq.owner, []).append(seq)
    left, num_left = most, len(by_owner)
    in_step: set[Sequence] = set()
    for own in sorted(by_owner.values(), key=len):  # who has few leaves the rest to the others
        own.sort(key=_last_turn)
        part = own[: max(1, left // num_left)]
        in_step.update(part)
        left, num_left = left - len(part), num_left - 1
    return in_step


def _last_turn(seq: Sequence) -> int:
    return seq.last_turn
