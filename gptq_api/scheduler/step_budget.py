"""How many tokens a step computes: as many of prompts as those who decode beside them can wait for.

A sequence that decodes gets its next token when the step ends, so every token of a prompt delays it. Where a runner
says what these cost (`PromptCosts`), prompts get a time in each step, not a number of rows: the context of a long one
costs as well. Where many prompts wait, though, each step beside them that is cut short has all who decode ride along
once more, and the last of them waits the longer for its first token: then steps are as large as they may be.
"""

from __future__ import annotations

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


class StepBudget:
    def __init__(self, limit: int, row_multiple: int, costs: PromptCosts | None) -> None:
        """`limit`: tokens of a step; `row_multiple`: what their number is best a multiple of, where they are many."""
        self.limit, self._row_multiple, self._costs = limit, row_multiple, costs

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
