"""How many tokens a step computes: as many of prompts as those who decode beside them can wait for.

A sequence that decodes gets its next token when the step ends, so every token of a prompt delays it. Where a runner
says what these cost (`PromptCosts`), prompts get a time in each step, not a number of rows: the context of a long one
costs as well. What the runner says is corrected by what steps take, since short chunks of a prompt with a long context
keep a device less busy than what was measured at start. Where many prompts wait, though, each step beside them that is
cut short has all who decode ride along once more, and the last of them waits the longer for its first token: then steps
are as large as they may be.
"""

from __future__ import annotations

from dataclasses import replace

from gptq_api.step import PromptCosts

PROMPT_MS = 16.0
"""what the prompts of a step may take: at 64 sequences of a 13B on an H200, which decode in 9 ms, a token comes every
25 ms then"""
LEAST_DECODE_STEPS = 4
"""or so many steps of one sequence, of a model whose steps are long"""
FEW = 8
"""so many that decode wait twice as long: the prompt is then most of what the device has to do"""
MANY = 128
"""from here on the time grows with those who decode, whose own part of the step does"""
QUEUE = 24
"""prompts; with more of them steps are as large as they may be"""
MANY_TILES = 4
"""so many, and a rounding to whole ones changes little in what a step takes"""
LEARNT = 0.5
"""of what a step was off by goes into the costs"""
FEWEST_ROWS = 64
"""of prompts in a step, from which something is learnt: fewer leave a part of each tile empty"""
MOST_OFF = 2.0
"""a step that took longer still, or less than its inverse, counts as so much: something else was in it"""
FARTHEST = 4.0
"""costs never become more than so many times what the runner said, or less than its inverse"""


class StepBudget:
    def __init__(self, limit: int, row_multiple: int, costs: PromptCosts | None) -> None:
        """`limit`: tokens of a step; `row_multiple`: what their number is best a multiple of, where they are many."""
        self.limit, self._row_multiple, self._costs, self._said = limit, row_multiple, costs, costs
        self._decoding: tuple[int, float] | None = None
        """sequences in the last step of decoding alone, and the milliseconds it took"""

    def num_rows(self, num_decoding: int, num_prompts: int, context: int) -> int:
        """Tokens of a step, of the `num_decoding` among them one each. `num_prompts`: that wait or are not computed to
        their ends; `context`: the most tokens before the next chunk of one of them."""
        if not num_decoding:
            return self.limit
        num_rows = num_decoding + self._of_prompts(num_decoding, num_prompts, context)
        if num_rows >= MANY_TILES * self._row_multiple:
            num_rows = round(num_rows / self._row_multiple) * self._row_multiple
        return min(self.limit, num_rows)

    def _of_prompts(self, num_decoding: int, num_prompts: int, context: int) -> int:
        """Without costs: 3/4 of the limit, less 2 tokens for each sequence that decodes (beside its own row it costs
        the reading of its context), and a quarter at least."""
        costs, limit = self._costs, self.limit
        if costs is None:
            return max(1, limit // 4, 3 * limit // 4 - 2 * num_decoding)
        if num_prompts > QUEUE:
            return limit
        milliseconds = max(PROMPT_MS, LEAST_DECODE_STEPS * costs.decode_ms) * max(1.0, num_decoding / MANY)
        if num_decoding <= FEW:
            milliseconds *= 2
        row_ms = costs.row_ms + context * costs.context_ms
        return max(1, int(min(milliseconds / row_ms, limit))) if row_ms else limit

    @property
    def learns(self) -> bool:
        return self._costs is not None

    def took(self, milliseconds: float, num_decoding: int, num_rows: int, context: float) -> None:
        """A step has taken so long that computed `num_rows` of prompts, with `context` tokens before each of them on
        average, beside `num_decoding` sequences. What it took beyond a step of those corrects each cost by its part."""
        costs, said = self._costs, self._said
        if costs is None or said is None:
            return
        if not num_rows:
            self._decoding = num_decoding, milliseconds
            return
        without_ms = self._without_prompts(num_decoding, costs)
        rows_ms, context_ms = num_rows * costs.row_ms, num_rows * context * costs.context_ms
        expected = rows_ms + context_ms
        if num_rows < FEWEST_ROWS or num_rows + num_decoding >= self.limit or without_ms is None or expected <= 0:
            return
        off = LEARNT * (min(max((milliseconds - without_ms) / expected, 1 / MOST_OFF), MOST_OFF) - 1)
        self._costs = replace(
            costs,
            row_ms=_near(costs.row_ms * (1 + off * rows_ms / expected), said.row_ms),
            context_ms=_near(costs.context_ms * (1 + off * context_ms / expected), said.context_ms),
        )

    def _without_prompts(self, num_decoding: int, costs: PromptCosts) -> float | None:
        """What a step of so many takes, by the last one that had no prompts; None where that is not known."""
        if num_decoding <= 1:
            return costs.decode_ms
        if self._decoding is None:
            return costs.decode_ms if num_decoding <= FEW else None
        num, milliseconds = self._decoding
        return costs.decode_ms + max(0.0, milliseconds - costs.decode_ms) * num_decoding / num


def _near(cost: float, said: float) -> float:
    return min(max(cost, said / FARTHEST), said * FARTHEST)
