"""Engine: the one place where scheduler and model meet. A step is four calls: schedule, launch, collect, update; and
draw, where a grammar says what may be sampled."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

import msgspec

from gptq_api.engine.trace import Trace
from gptq_api.grammar.matchers import Compiled, Constrained, Grammars
from gptq_api.logs import num_dropped
from gptq_api.scheduler.scheduler import Progress, Scheduler
from gptq_api.step import DeviceMemoryError, Launched, Runner, Sampled, Step
from gptq_api.types import Add, EngineStats, FinishReason, StepOutput, TokenLogprobs, pack_ids, unpack_ids

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _InFlight(Generic[Launched]):
    step: Step
    launched: Launched
    began: float
    """on the engine's clock: before the launch, and after it"""
    ended: float
    constrained: list[Constrained]
    """entries that sample by a grammar"""
    drawn: bool
    """whether the runner has all it needs to sample"""


class Engine(Generic[Launched]):
    """Owns the loop's state. Not thread-safe: add, abort and step are called by one thread."""

    def __init__(
        self,
        runner: Runner[Launched],
        scheduler: Scheduler,
        trace: Trace | None = None,
        grammars: Grammars | None = None,
        post: Callable[[str, Compiled], None] | None = None,
        num_events_dropped: Callable[[], int] = int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`post`: takes a compiled grammar from another thread and has it passed to `compiled` by ours; without it,
        `add` waits for what it compiles. `num_events_dropped`: of KV events, for the stats. `clock`: seconds, by which
        steps are timed."""
        self.runner, self.scheduler, self._trace = runner, scheduler, trace
        self._grammars, self._post, self._num_events_dropped, self._clock = grammars, post, num_events_dropped, clock
        self._collected = clock()  # when the last step was
        self._in_flight: deque[_InFlight[Launched]] = deque()
        self._finished: dict[int, FinishReason] = {}  # to be told with the next output
        self._admitted: dict[int, float] = {}  # as well
        self._compiling: dict[str, list[Add]] = {}  # by grammar, who waits for it
        self._aborted: set[int] = set()  # of those

    def add(self, message: Add) -> None:
        """Queue a sequence for each of the params, behind its grammar where that is not compiled yet. Where one can
        never fit, or has ids the model has no row for, all of them end with "error": the API process should have
        refused them, and no step may see them."""
        grammar = message.params[0].grammar  # the samples of a prompt differ in their seeds alone
        if not grammar or (self._grammars is not None and self._grammars.has(grammar)):
            self._queue(message)
        elif self._grammars is None:
            self._give_up(message)
        elif self._post is None:
            self._compiling[grammar] = [message]
            self.compiled(grammar, self._grammars.compiled_now(grammar))
        elif grammar in self._compiling:
            self._compiling[grammar].append(message)
        else:
            self._compiling[grammar] = [message]
            self._grammars.compile(grammar, self._post)

    def compiled(self, grammar: str, found: Compiled) -> None:
        """A grammar that sequences wait for is there, or can not be."""
        assert self._grammars is not None
        error = self._grammars.keep(grammar, found)
        if error:
            _log.error("a grammar that had been checked does not compile: %s", error)
        for message in self._compiling.pop(grammar):
            if error:
                self._give_up(message)
                continue
            self._queue(message)
            for sequence_id in self._aborted.intersection(_ids(message)):
                self._aborted.discard(sequence_id)
                self.scheduler.abort(sequence_id)

    def _queue(self, message: Add) -> None:
        ids = unpack_ids(message.prompt)
        fits = self._has_rows(message) and self.scheduler.add(
            message.first_id,
            ids,
            message.params,
            message.cache_salt,
            message.priority,
            owner=message.owner,
            level=message.level,
            prediction=self._predicted(message),
        )
        if not fits:
            self._give_up(message)

    def _give_up(self, message: Add) -> None:
        self._finished |= dict.fromkeys(_ids(message), "error")

    def _predicted(self, message: Add) -> list[int]:
        """As far as the model has rows for it: no step may see another id, and what comes behind it is no guess."""
        ids, num_rows = unpack_ids(message.prediction), self.runner.vocab_size
        if max(memoryview(message.prediction).cast("I"), default=0) < num_rows:  # unsigned, as below
            return ids
        return ids[: next(i for i, token_id in enumerate(ids) if not 0 <= token_id < num_rows)]

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
        if any(sequence_id in _ids(message) for messages in self._compiling.values() for message in messages):
            self._aborted.add(sequence_id)
        self.scheduler.abort(sequence_id)

    def has_work(self) -> bool:
        return self.scheduler.has_work() or bool(self._in_flight or self._finished)

    def step(self) -> StepOutput | None:
        """Launch the next step, then report what each sequence got in the step before: the device is never idle while
        the host digests. None where that is the first step and nothing can be reported yet.

        With a runner of lookahead 0 the step that is launched is the one reported.
        """
        self._draw()
        launched = self._launch()
        if not self._in_flight or (launched and len(self._in_flight) <= self.runner.lookahead):
            return None if launched else self.report()
        self._draw()
        first = self._in_flight.popleft()
        sampled = self._collect(first)
        collected = self._clock()
        # The device begins a step when it is launched, or has ended the one before.
        progress = self.scheduler.update(first.step, sampled, collected - max(first.began, self._collected))
        self._collected = collected
        self._finished |= progress.finished
        if self.runner.lookahead and not self._in_flight:
            self._launch()  # the step waited for these tokens, and the device need not wait until they are told
        if self._trace is not None:
            self._trace.write(first.began, first.ended, collected, first.step, sampled)
        return self._output(first.step.num_tokens, progress, sampled.logprobs)

    def report(self) -> StepOutput:
        """The state between steps; nobody gets a token."""
        return self._output(0, Progress(), {})

    def _launch(self) -> bool:
        """Whether there was anything to launch."""
        while (step := self.scheduler.schedule()).seats:
            try:
                began, now = self._clock(), time.monotonic()
                launched = self.runner.launch(step)
                ended = self._clock()
                if step.admitted:
                    newcomers = self.scheduler.running[-len(step.admitted) :]
                    self._admitted |= {seq.sequence_id: now for seq in newcomers}
                constrained = [] if self._grammars is None else self._grammars.of(step)
                self._in_flight.append(_InFlight(step, launched, began, ended, constrained, drawn=not constrained))
                return True
            except DeviceMemoryError as error:
                ids = self.scheduler.withdraw(step)
                _log.warning("no memory on the device for a step of %d tokens: %s", step.num_tokens, error)
                if step.num_tokens == 1:
                    self.scheduler.abort(ids[0])
                    self._finished[ids[0]] = "error"
        return False

    def _draw(self) -> None:
        """The oldest step in flight samples, unless it has. Its masks are made while the device computes its logits:
        the tokens that they follow from are known since the step before was collected."""
        if self._in_flight and not (first := self._in_flight[0]).drawn:
            assert self._grammars is not None
            self.runner.draw(first.launched, self._grammars.masks(first.constrained))
            first.drawn = True

    def _collect(self, step: _InFlight[Launched]) -> Sampled:
        sampled = self.runner.collect(step.launched)
        return self._follow(step, sampled) if step.constrained else sampled

    def _follow(self, step: _InFlight[Launched], sampled: Sampled) -> Sampled:
        """The grammars take the tokens in; what one of them cannot take is -2 instead."""
        assert self._grammars is not None
        places, place = dict[int, int](), 0
        for entry, num in enumerate(sampled.num_tokens):
            places[entry] = place  # of its one token
            place += num
        got = {row.entry: sampled.tokens[places[row.entry]] for row in step.constrained}
        failed = self._grammars.advance(step.constrained, got)
        if not failed:
            return sampled
        tokens = list(sampled.tokens)
        for entry, error in failed.items():
            _log.warning("a grammar is given up, and its sequence with it: %s", error)
            tokens[places[entry]] = -2
        return msgspec.structs.replace(sampled, tokens=tokens)

    def _output(self, num_batched_tokens: int, progress: Progress, logprobs: dict[int, TokenLogprobs]) -> StepOutput:
        finished, self._finished = self._finished, {}
        admitted, self._admitted = self._admitted, {}
        told = {i: logprobs[place] for i, place in enumerate(progress.places) if place in logprobs} if logprobs else {}
        return StepOutput(
            sequence_ids=pack_ids(progress.sequence_ids),
            tokens=pack_ids(progress.tokens),
            finished=finished,
            cached_tokens=progress.cached_tokens,
            logprobs=told,
            stats=self.stats(num_batched_tokens),
            prompt_logprobs=progress.prompt_logprobs,
            admitted=admitted,
            drafted=progress.drafted,
            predicted=progress.predicted,
        )

    def stats(self, num_batched_tokens: int = 0) -> EngineStats:
        scheduler = self.scheduler
        num_deferred = sum(map(_num_sequences, self._compiling.values()))
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + num_deferred,
            num_deferred=num_deferred,
            num_free_blocks=scheduler.blocks.num_free,
            num_blocks=scheduler.blocks.num_blocks,
            num_preemptions=scheduler.counters.preemptions,
            num_prefix_queries=scheduler.counters.prefix_queries,
            num_prefix_hits=scheduler.counters.prefix_hits,
            num_batched_tokens=num_batched_tokens,
            num_log_lines_dropped=num_dropped(),
            num_graphs=self.runner.num_graphs,
            num_drafts=scheduler.counters.drafts,
            num_draft_tokens=scheduler.counters.draft_tokens,
            num_accepted_tokens=scheduler.counters.accepted_tokens,
            num_kv_events_dropped=self._num_events_dropped(),
        )


def _ids(message: Add) -> range:
    return range(message.first_id, message.first_id + len(message.params))


def _num_sequences(messages: list[Add]) -> int:
    return sum(len(message.params) for message in messages)
