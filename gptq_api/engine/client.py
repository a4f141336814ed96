"""The asyncio side of the engine, and the request queue: submit, read tokens, leave.

    with client.submit([Prompt(token_ids, [params])]) as generation:
        async for deltas in generation:
            ...

Leaving the block, for whatever reason, is the abort. Knows nothing about text; never imports torch.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from gptq_api.config import EngineSettings
from gptq_api.engine.generation import Generation
from gptq_api.engine.life import EngineFailed, EngineLife, EngineLost
from gptq_api.engine.places import Places
from gptq_api.engine.restarts import Restarts, another_model, continued
from gptq_api.engine.silence import SilenceWatch
from gptq_api.types import Abort, Add, EngineStats, Ready, SamplingParams, StepOutput, pack_ids, unpack_ids

_log = logging.getLogger(__name__)

_CPU_TIMEOUT_S, _CUDA_TIMEOUT_S = 600.0, 60.0
_RETRY_AFTER_S = 5
_MAX_PAUSE_S = 30.0
"""before a new start, where engines die while they load"""
_LOAD_FACTOR = 10.0
"""An engine that is started again has so many times what the last one took, and --engine-timeout-s"""


class EngineDead(RuntimeError):
    """The engine process is gone."""


class EngineStalled(RuntimeError):
    """The engine has been silent over its work for `EngineClient.timeout_s`; the sequence was given up."""


@dataclass(slots=True, frozen=True)
class Prompt:
    """One prompt and how each of its samples is drawn."""

    token_ids: list[int]
    params: list[SamplingParams]
    """one per sample"""
    prediction: bytes = b""
    """`pack_ids` of what each answer may look like"""


_NO_STATS = EngineStats(0, 0, 0, 0, 0, 0, 0, 0)


class EngineClient:
    """Owns the engine: one process after the other, where it may be started again. What is admitted, and who reads it,
    is kept here; what belongs to one process in `EngineLife`."""

    def __init__(self, settings: EngineSettings, restarts: int = 0, *, kill_stalled: bool = False) -> None:
        """`restarts`: how often within ten minutes an engine that died is followed by another; `kill_stalled`: whether
        one that is silent for too long is killed."""
        self.settings = settings
        self.alive = False
        self.places = Places(settings.max_queued_requests)
        self.on_step: Callable[[StepOutput], None] | None = None
        """called with every step's output, for metrics"""
        self.num_restarts = 0
        self.num_wasted_tokens = 0
        """that were generated for nobody: the client had left, or a stop string had ended the answer"""
        self.why_dead = ""
        """a sentence without its period, once `wait_dead` returns"""
        self._life: EngineLife | None = None
        self._restarts, self._kill_stalled = Restarts(restarts), kill_stalled
        self._renewal: asyncio.Task[None] | None = None  # puts a new engine in the place of one that died
        self._loading_since: float | None = None  # where a new engine is on its way
        self._load_s = 0.0  # what the last one took
        self._dead = asyncio.Event()
        self._stats, self._past_stats = _NO_STATS, _NO_STATS  # of this engine, of those that died
        self._silence = SilenceWatch(lambda: self.timeout_s, self._give_up)
        self._told_stalled = False
        self._generations: dict[int, Generation] = {}  # by sequence id: who has a place
        self._unfinished: set[int] = set()  # sequence ids of those the engine works on
        self._next_id = 1

    @property
    def num_admitted(self) -> int:
        """Sequences that have a place now, running and waiting."""
        return self.places.num_held

    @property
    def stats(self) -> EngineStats:
        """What the engine said last, with the counters of those before it."""
        return continued(self._past_stats, self._stats)

    @property
    def fault(self) -> Literal["loading", "dead", "stalled"] | None:
        """Why nothing is admitted; None where it is."""
        if not self.alive:
            return "dead" if self._loading_since is None else "loading"
        return "stalled" if self.stalled else None

    @property
    def stalled(self) -> bool:
        """Whether the engine has work and has not been heard of for `timeout_s`."""
        return self._silence.stalled

    @property
    def timeout_s(self) -> float:
        """How long the engine may be silent over its work."""
        if self.settings.engine_timeout_s is not None:
            return self.settings.engine_timeout_s
        return _CPU_TIMEOUT_S if self.ready.device == "cpu" else _CUDA_TIMEOUT_S

    @property
    def retry_after_s(self) -> int:
        """When it is worth asking again, with a `fault`: an engine that loads is there after as long as the last."""
        if self._loading_since is None:
            return _RETRY_AFTER_S
        return max(math.ceil(self._loading_since + self._load_s - time.monotonic()), 1)

    async def start(self) -> Ready:
        """Start the process and wait until the model is loaded. Raises EngineFailed."""
        self._begin(await self._load())
        return self.ready

    async def stop(self, within_s: float = 10.0) -> None:
        """Close the socket, which ends the engine, and wait for it; kill it after `within_s`. Generations still open
        fail with EngineDead."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.gather(self._renewal, return_exceptions=True)
        self._lose("the server is shutting down")
        if self._life is not None:
            await self._life.stop(within_s)

    def end_restarts(self) -> None:
        """Where the engine dies from now on, no other takes its place."""
        self._restarts.end()

    async def wait_dead(self) -> None:
        """Returns when the engine is gone for good without having been asked to."""
        await self._dead.wait()

    async def _load(self) -> Ready:
        self._loading_since = time.monotonic()
        self._life = EngineLife(self.settings, self._deliver, self._died)
        try:
            ready = await self._life.start()
            self._load_s = time.monotonic() - self._loading_since
            return ready
        finally:
            self._loading_since = None

    def _begin(self, ready: Ready) -> None:
        self.ready, self.alive = ready, True

    def _died(self) -> None:
        """The engine is gone without having been asked to."""
        self._lose("the engine process died")
        self._loading_since = time.monotonic() if self._restarts.take() else None
        self._renewal = asyncio.ensure_future(self._renew())

    async def _renew(self) -> None:
        """Another engine in place of the one that died, as often as the settings allow."""
        assert self._life is not None
        self.why_dead, num_lost = f"the engine process {await self._life.ended()}", 0
        while self._loading_since is not None:
            if self._life.is_running:  # what it holds of the device is not free
                break
            _log.error("%s; it is started again", self.why_dead)
            self.num_restarts += 1
            try:
                await asyncio.sleep(min(2**num_lost - 1, _MAX_PAUSE_S))
                limit_s = _LOAD_FACTOR * self._load_s + self.timeout_s
                async with asyncio.timeout(limit_s):
                    ready = await self._load()
                if another := another_model(self.ready, ready):
                    await self._life.stop()
                    raise EngineFailed(another)
                self._begin(ready)
                _log.warning("the engine is ready again after %.1f s: %s", self._load_s, ready.description)
                return
            except (EngineLost, TimeoutError) as error:
                self.why_dead = str(error) or f"the engine process took more than {limit_s:.3g} s to load the model"
                num_lost += 1
                self._loading_since = time.monotonic() if self._restarts.take() else None
            except EngineFailed as error:
                self.why_dead = str(error)
        self._loading_since = None
        self._dead.set()

    @contextmanager
    def submit(
        self,
        prompts: Sequence[Prompt],
        cache_salt: bytes = b"",
        priority: int = 0,
        *,
        owner: bytes = b"",
        level: int = 0,
    ) -> Iterator[Generation]:
        """Queue every sample of every prompt, or none: each is a sequence and takes a place. The lowest `level` is
        served first; within one owners take turns, and each has its lowest `priority` served first.

        Raises EngineDead, EngineStalled, PlacesTaken; ValueError if one is longer than the context.
        """
        if not self.alive:
            raise EngineDead("the engine process is not running")
        if self.stalled:
            raise EngineStalled(self._how_silent())
        for prompt in prompts:
            self._check_length(prompt)
        num_sequences = sum(len(prompt.params) for prompt in prompts)
        self.places.take(owner, num_sequences)
        generation = Generation(self._leave, self._next_id, num_sequences, owner)
        sequence_ids = range(self._next_id, self._next_id + num_sequences)
        self._next_id += num_sequences
        self._generations |= dict.fromkeys(sequence_ids, generation)
        self._unfinished.update(sequence_ids)
        try:
            first_id = generation.first_id
            for prompt in prompts:
                params = tuple(prompt.params)
                ids = pack_ids(prompt.token_ids)
                self._send(Add(first_id, ids, params, cache_salt, priority, owner, level, prompt.prediction))
                first_id += len(params)
            yield generation
        finally:  # finished, stop string, client gone, error: one door
            self._leave(sequence_ids)

    def _check_length(self, prompt: Prompt) -> None:
        num_prompt, num_answer = len(prompt.token_ids), max(params.max_tokens for params in prompt.params)
        if not num_prompt or num_prompt + num_answer > self.ready.max_model_len:
            raise ValueError(
                f"prompt of {num_prompt} and answer of {num_answer} tokens do not fit into {self.ready.max_model_len}"
            )

    def _leave(self, sequence_ids: Sequence[int]) -> None:
        """Their places are free. Those that have left already, or were given up, are passed over."""
        left = [i for i in sequence_ids if i in self._generations]
        for sequence_id in left:
            self._give_back(sequence_id)
        self._abort([i for i in left if i in self._unfinished])

    def _give_back(self, sequence_id: int) -> None:
        self.places.give_back(self._generations.pop(sequence_id).owner, 1)

    def _abort(self, sequence_ids: list[int]) -> None:
        self._unfinished.difference_update(sequence_ids)
        if sequence_ids and self.alive:
            self._send(Abort(tuple(sequence_ids)))

    def _send(self, message: Add | Abort) -> None:
        """Everything that is sent is answered: by a step's output, or by its state when the engine comes to rest."""
        assert self._life is not None
        self._silence.spoken_to()
        self._life.send(message)

    def _give_up(self) -> None:
        """Tell the reader of every unfinished sequence, and give back its place. An engine that wakes up finds the
        aborts and forgets them; or it is killed."""
        given_up = sorted(self._unfinished)
        _log.error("%s; %d sequences are given up", self._how_silent(), len(given_up))
        self._told_stalled = True
        self._abort(self._fail(EngineStalled(self._how_silent())))
        if self._kill_stalled:
            assert self._life is not None
            _log.error("the engine is killed")
            self._life.kill()

    def _fail(self, error: Exception) -> list[int]:
        """Tell every reader of an unfinished sequence, once, and give back its place: a reader may be slow to leave.
        Which sequences they are."""
        failed = sorted(self._unfinished)
        self._unfinished.clear()
        for generation in {self._generations[sequence_id] for sequence_id in failed}:
            generation.fail(error)
        for sequence_id in failed:
            self._give_back(sequence_id)
        return failed

    def _how_silent(self) -> str:
        return f"the engine has been silent over its work for {self.timeout_s:g} s"

    def _deliver(self, step: StepOutput) -> None:
        self._stats = step.stats
        generations = self._generations
        for sequence_id, num_cached in step.cached_tokens.items():
            if generation := generations.get(sequence_id):
                generation.num_cached_tokens[sequence_id - generation.first_id] = num_cached
        for sequence_id, at in step.admitted.items():
            if generation := generations.get(sequence_id):
                generation.admit(sequence_id, at)
        for sequence_id, drafted in step.drafted.items():
            if generation := generations.get(sequence_id):
                generation.drafted[sequence_id - generation.first_id] = drafted
        for sequence_id, predicted in step.predicted.items():
            if generation := generations.get(sequence_id):
                generation.predicted[sequence_id - generation.first_id] = predicted
        for sequence_id, told in step.prompt_logprobs.items():
            if generation := generations.get(sequence_id):
                generation.put_prompt(sequence_id, told)
        for i, (sequence_id, token) in enumerate(
            zip(unpack_ids(step.sequence_ids), unpack_ids(step.tokens), strict=True)
        ):
            if generation := generations.get(sequence_id):  # it may have left already
                generation.put(sequence_id, token, step.logprobs.get(i))
            else:
                self.num_wasted_tokens += 1
        for sequence_id, reason in step.finished.items():
            if generation := generations.get(sequence_id):
                generation.finish(sequence_id, reason)
                self._unfinished.discard(sequence_id)
        at_rest = not (self._unfinished or step.stats.num_running or step.stats.num_waiting)
        self._silence.spoke(at_rest=at_rest)
        if self._told_stalled:
            self._told_stalled = False
            _log.warning("the engine speaks again")
        if self.on_step is not None:
            self.on_step(step)

    def _lose(self, why: str) -> None:
        """The engine is out of reach: every reader is told, and what we knew of it is forgotten."""
        self.alive = self._told_stalled = False
        self._silence.close()
        self._past_stats, self._stats = self.stats, _NO_STATS
        self._fail(EngineDead(why))
