"""Engine: the one place where scheduler and model meet. A step is four calls: schedule, launch, collect, update."""

from __future__ import annotations

import logging
from collections import deque
from typing import Generic, Protocol, TypeVar

from gptq_api.logs import num_dropped
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.sequence import Batch, DeviceMemoryError, Sampled, Sequence
from gptq_api.types import Add, EngineStats, FinishReason, StepOutput, TokenLogprobs, pack_ids, unpack_ids

_log = logging.getLogger(__name__)

Launched = TypeVar("Launched")


class Runner(Protocol[Launched]):
    """What the engine needs of a model: the work of one batch done, K/V written, tokens sampled."""

    lookahead: int
    """0: a step is collected before the next one is scheduled; 1: afterwards"""

    def launch(self, batch: Batch) -> Launched:
        """Start a step, after all that were launched before, and do not wait for it. Raises DeviceMemoryError.

        All that is needed of the batch's sequences is read here: they change while the step runs.
        """

    def collect(self, launched: Launched) -> Sampled:
        """Wait for the step launched longest ago."""


class Engine(Generic[Launched]):
    """Owns the loop's state. Not thread-safe: add, abort and step are called by one thread."""

    def __init__(self, runner: Runner[Launched], scheduler: Scheduler) -> None:
        self.runner, self.scheduler = runner, scheduler
        self._in_flight: deque[tuple[Batch, Launched]] = deque()
        self._finished: dict[int, FinishReason] = {}  # to be told with the next output

    def add(self, message: Add) -> None:
        """Queue a sequence. One that can never fit (the API process should have refused it) ends with "error"."""
        seq = Sequence(message.sequence_id, unpack_ids(message.prompt), message.params, message.cache_salt)
        if self.scheduler.fits(seq):
            self.scheduler.add(seq)
        else:
            self._finished[message.sequence_id] = "error"

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
        return self._output(0, [], [], {}, {})

    def _launch(self) -> bool:
        """Whether there was anything to launch."""
        while (batch := self.scheduler.schedule()).sequences:
            try:
                self._in_flight.append((batch, self.runner.launch(batch)))
                return True
            except DeviceMemoryError as error:
                self.scheduler.withdraw(batch)
                _log.warning("no memory on the device for a step of %d tokens: %s", batch.num_tokens, error)
                if batch.num_tokens == 1:
                    hopeless = batch.sequences[0].sequence_id
                    self.scheduler.abort(hopeless)
                    self._finished[hopeless] = "error"
        return False

    def _collect(self) -> StepOutput:
        batch, launched = self._in_flight.popleft()
        sampled = self.runner.collect(launched)
        ids: list[int] = []
        tokens: list[int] = []
        cached: dict[int, int] = {}
        logprobs: dict[int, TokenLogprobs] = {}
        for seq, token, logprob in zip(batch.sequences, sampled.tokens, sampled.logprobs, strict=True):
            if token is None or token < 0 or seq not in self.scheduler:
                continue
            ids.append(seq.sequence_id)
            tokens.append(token)
            if seq.num_output_tokens == 0:
                cached[seq.sequence_id] = seq.num_cached_tokens or 0
            if logprob is not None:
                logprobs[seq.sequence_id] = logprob
        done = self.scheduler.update(batch, sampled)
        self._finished |= {seq.sequence_id: reason for seq, reason in done.items()}
        return self._output(batch.num_tokens, ids, tokens, cached, logprobs)

    def _output(
        self,
        num_batched_tokens: int,
        ids: list[int],
        tokens: list[int],
        cached: dict[int, int],
        logprobs: dict[int, TokenLogprobs],
    ) -> StepOutput:
        finished, self._finished = self._finished, {}
        return StepOutput(
            sequence_ids=pack_ids(ids),
            tokens=pack_ids(tokens),
            finished=finished,
            cached_tokens=cached,
            logprobs=logprobs,
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
