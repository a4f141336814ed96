"""Engine: the one place where scheduler and model meet. A step is four calls: schedule, launch, collect, update."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Generic

from gptq_api.engine.trace import Trace
from gptq_api.logs import num_dropped
from gptq_api.scheduler.scheduler import Progress, Scheduler
from gptq_api.step import DeviceMemoryError, Launched, Runner, Step
from gptq_api.types import Add, EngineStats, FinishReason, StepOutput, TokenLogprobs, pack_ids, unpack_ids

_log = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class _InFlight(Generic[Launched]):
    step: Step
    launched: Launched
    began: float
    """time.perf_counter() before the launch, and after it"""
    ended: float


class Engine(Generic[Launched]):
    """Owns the loop's state. Not thread-safe: add, abort and step are called by one thread."""

    def __init__(self, runner: Runner[Launched], scheduler: Scheduler, trace: Trace | None = None) -> None:
        self.runner, self.scheduler, self._trace = runner, scheduler, trace
        self._in_flight: deque[_InFlight[Launched]] = deque()
        self._finished: dict[int, FinishReason] = {}  # to be told with the next output

    def add(self, message: Add) -> None:
        """Queue a sequence for each of the params. Where one can never fit, or has ids the model has no row for, all of
        them end with "error": the API process should have refused them, and no step may see them."""
        first, ids = message.first_id, unpack_ids(message.prompt)
        fits = self._has_rows(message) and self.scheduler.add(first, ids, message.params, message.cache_salt)
        if not fits:
            self._finished |= dict.fromkeys(range(first, first + len(message.params)), "error")

    def _has_rows(self, message: Add) -> bool:
        num_rows = self.runner.vocab_size
        # unsigned: a negative id is a large one
        if max(memoryview(message.prompt).cast("I"), default=0) >= num_rows:
            return False
        return all(
            0 <= token_id < num_rows
            for params in message.params
            for token_id in (*params.stop_token_ids, *params.logit_bias)
        )

    def abort(self, sequence_id: int) -> None:
        """Forget a sequence at once; a token of it that is in flight is dropped."""
        self.scheduler.abort(sequence_id)

    def has_work(self) -> bool:
        return self.scheduler.has_work() or bool(self._in_flight or self._finished)

    def step(self) -> StepOutput | None:
        """Launch the next step, then report what each sequence got in the step before: the device is never idle while
        the host digests. None where that is the first step and nothing can be reported yet.

        With a runner of lookahead 0 the step that is launched is the one reported.
        """
        launched = self._launch()
        if self._in_flight and (len(self._in_flight) > self.runner.lookahead or not launched):
            return self._collect()
        return None if launched else self.report()

    def report(self) -> StepOutput:
        """The state between steps; nobody gets a token."""
        return self._output(0, Progress(), {})

    def _launch(self) -> bool:
        """Whether there was anything to launch."""
        while (step := self.scheduler.schedule()).seats:
            try:
                began = time.perf_counter()
                launched = self.runner.launch(step)
                self._in_flight.append(_InFlight(step, launched, began, time.perf_counter()))
                return True
            except DeviceMemoryError as error:
                ids = self.scheduler.withdraw(step)
                _log.warning("no memory on the device for a step of %d tokens: %s", step.num_tokens, error)
                if step.num_tokens == 1:
                    self.scheduler.abort(ids[0])
                    self._finished[ids[0]] = "error"
        return False

    def _collect(self) -> StepOutput:
        first = self._in_flight.popleft()
        step, sampled = first.step, self.runner.collect(first.launched)
        if self._trace is not None:
            self._trace.write(first.began, first.ended, step, sampled)
        progress = self.scheduler.update(step, sampled)
        self._finished |= progress.finished
        return self._output(step.num_tokens, progress, sampled.logprobs)

    def _output(self, num_batched_tokens: int, progress: Progress, logprobs: dict[int, TokenLogprobs]) -> StepOutput:
        finished, self._finished = self._finished, {}
        told = {i: logprobs[place] for i, place in enumerate(progress.places) if place in logprobs} if logprobs else {}
        return StepOutput(
            sequence_ids=pack_ids(progress.sequence_ids),
            tokens=pack_ids(progress.tokens),
            finished=finished,
            cached_tokens=progress.cached_tokens,
            logprobs=told,
            stats=self.stats(num_batched_tokens),
        )

    def stats(self, num_batched_tokens: int = 0) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_free_blocks=scheduler.blocks.num_free,
            num_blocks=scheduler.blocks.num_blocks,
            num_preemptions=scheduler.counters.preemptions,
            num_prefix_queries=scheduler.counters.prefix_queries,
            num_prefix_hits=scheduler.counters.prefix_hits,
            num_batched_tokens=num_batched_tokens,
            num_log_lines_dropped=num_dropped(),
        )
