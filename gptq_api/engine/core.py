"""Engine: the one place where scheduler and model meet. A step is four calls: schedule, launch, collect, update."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.sequence import Batch, Sampled, Sequence
from gptq_api.types import Add, EngineStats, FinishReason, StepOutput, TokenLogprobs, pack_ids, unpack_ids

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
        self._refused: dict[int, FinishReason] = {}

    def add(self, message: Add) -> None:
        """Queue a sequence. One that can never fit (the API process should have refused it) ends with "error"."""
        seq = Sequence(message.sequence_id, unpack_ids(message.prompt), message.params, message.cache_salt)
        if self.scheduler.fits(seq):
            self.scheduler.add(seq)
        else:
            self._refused[message.sequence_id] = "error"

    def abort(self, sequence_id: int) -> None:
        self.scheduler.abort(sequence_id)

    def has_work(self) -> bool:
        return self.scheduler.has_work() or bool(self._refused)

    def step(self) -> StepOutput:
        """Advance every scheduled sequence once and report what each of them got."""
        batch = self.scheduler.schedule()
        sampled = self.runner.collect(self.runner.launch(batch)) if batch.sequences else Sampled([], [])
        fresh = [seq for seq in batch.sequences if seq.num_output_tokens == 0]
        done = self.scheduler.update(batch, sampled)

        ids: list[int] = []
        tokens: list[int] = []
        logprobs: dict[int, TokenLogprobs] = {}
        for seq, token, logprob in zip(batch.sequences, sampled.tokens, sampled.logprobs, strict=True):
            if token is not None and token >= 0:
                ids.append(seq.sequence_id)
                tokens.append(token)
                if logprob is not None:
                    logprobs[seq.sequence_id] = logprob
        finished, self._refused = self._refused, {}
        finished |= {seq.sequence_id: reason for seq, reason in done.items()}
        return StepOutput(
            sequence_ids=pack_ids(ids),
            tokens=pack_ids(tokens),
            finished=finished,
            cached_tokens={seq.sequence_id: seq.num_cached_tokens or 0 for seq in fresh if seq.num_output_tokens == 1},
            logprobs=logprobs,
            stats=self.stats(batch.num_tokens),
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
        )
