"""The line of the log that says how fast the engine is: one for ten seconds in which it worked, none while it rests."""

from __future__ import annotations

import asyncio
import time

import structlog

from gptq_api.api.collectors import EngineLoad
from gptq_api.engine.client import EngineClient
from gptq_api.types import StepOutput

log = structlog.get_logger()

PERIOD_S = 10.0


class SpeedLine:
    """`on_step` adds up; the timer of a period is armed by its first step."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._since: float | None = None  # the period that runs, time.monotonic(); None: the engine rests
        self._num_computed = self._num_generated = self._num_first = 0
        self._num_drafted = self._num_accepted = 0
        self._totals = (0, 0)  # of drafted and accepted tokens, as the engine told them last

    def on_step(self, step: StepOutput) -> None:
        stats = step.stats
        self._num_computed += stats.num_batched_tokens
        self._num_generated += len(step.tokens) // 4  # packed int32
        self._num_first += len(step.cached_tokens)
        self._num_drafted += max(stats.num_draft_tokens - self._totals[0], 0)  # an engine that is new begins at 0
        self._num_accepted += max(stats.num_accepted_tokens - self._totals[1], 0)
        self._totals = stats.num_draft_tokens, stats.num_accepted_tokens
        if self._since is None and stats.num_batched_tokens:
            self._begin()

    def _begin(self) -> None:
        self._since = time.monotonic()
        asyncio.get_running_loop().call_later(PERIOD_S, self._tell)

    def _tell(self) -> None:
        assert self._since is not None
        seconds, load = time.monotonic() - self._since, EngineLoad.of(self._engine)
        num_computed, num_generated, num_first = self._num_computed, self._num_generated, self._num_first
        num_drafted, num_accepted = self._num_drafted, self._num_accepted
        self._num_computed = self._num_generated = self._num_first = self._num_drafted = self._num_accepted = 0
        if not num_computed and not load.num_running:
            self._since = None
            return
        # a token that was generated is computed by the step after, but for the last one of its sequence
        num_prompt = max(num_computed - (num_generated - num_first) - (num_drafted - num_accepted), 0)
        log.info(
            "speed",
            prompt_tok_s=round(num_prompt / seconds, 1),
            generation_tok_s=round(num_generated / seconds, 1),
            running=load.num_running,
            waiting=load.num_waiting,
            cache_pct=round(100 * load.cache_usage, 1),
            **({"drafts_accepted_pct": round(100 * num_accepted / num_drafted, 1)} if num_drafted else {}),
        )
        self._begin()
