"""The asyncio side of the engine, and the request queue: submit, read tokens, leave.

    with client.submit([Prompt(token_ids, [params])]) as generation:
        async for deltas in generation:
            ...

Leaving the block, for whatever reason, is the abort. Knows nothing about text; never imports torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from gptq_api import frames
from gptq_api.child import child_command
from gptq_api.config import EngineSettings
from gptq_api.engine import wire
from gptq_api.engine.generation import Generation
from gptq_api.engine.places import Places
from gptq_api.errors import UserError
from gptq_api.logs import Style
from gptq_api.types import (
    Abort,
    Add,
    EngineStats,
    Failed,
    FromEngine,
    Ready,
    SamplingParams,
    StepOutput,
    pack_ids,
    unpack_ids,
)

_log = logging.getLogger(__name__)

_CPU_TIMEOUT_S, _CUDA_TIMEOUT_S = 600.0, 60.0
_LATE_S = 1.0
"""A look at the clock that comes so late says that this process was stopped as well (^Z, a paused container)"""


class EngineFailed(UserError):
    """The engine could not start; the text is one sentence for the user."""


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


_NO_STATS = EngineStats(0, 0, 0, 0, 0, 0, 0, 0)


class EngineClient:
    """Owns the engine process."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.alive = False
        self.stats = _NO_STATS
        self.places = Places(settings.max_queued_requests)
        self.on_step: Callable[[StepOutput], None] | None = None
        """called with every step's output, for metrics"""
        self._stopping = False
        self._generations: dict[int, Generation] = {}  # by sequence id: who has a place
        self._unfinished: set[int] = set()  # sequence ids of those the engine works on
        self._owed_since: float | None = None  # when the engine last spoke, or was first spoken to; None: it is at rest
        self._watch: asyncio.TimerHandle | None = None  # looks at _owed_since, where it is not None
        self._told_stalled = False
        self._next_id = 1

    @property
    def num_admitted(self) -> int:
        """Sequences that have a place now, running and waiting."""
        return self.places.num_held

    @property
    def stalled(self) -> bool:
        """Whether the engine has work and has not been heard of for `timeout_s`."""
        owed_since = self._owed_since
        return owed_since is not None and time.monotonic() - owed_since >= self.timeout_s

    @property
    def timeout_s(self) -> float:
        """How long the engine may be silent over its work."""
        if self.settings.engine_timeout_s is not None:
            return self.settings.engine_timeout_s
        return _CPU_TIMEOUT_S if self.ready.device == "cpu" else _CUDA_TIMEOUT_S

    @property
    def pid(self) -> int:
        return self._process.pid

    async def start(self) -> Ready:
        """Start the process and wait until the model is loaded. Raises EngineFailed."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with theirs:
            style = Style(self.settings.log_level, self.settings.log_json)
            command = child_command("gptq_api.engine.process", str(theirs.fileno()), style=style)
            # not in a thread: cancelled there, it would start the engine with a descriptor that is closed already
            self._process = _spawn(command, theirs.fileno())
        self._dead = asyncio.Event()
        self._ready: asyncio.Future[Ready] = loop.create_future()
        try:
            self._transport, _ = await loop.create_connection(lambda: _Connection(self), sock=ours)
        except BaseException:
            self._stopping = True  # asyncio closes the socket, which ends the engine: nobody waits for its news
            raise
        self._transport.write(
            frames.frame(self.settings.model_dump_json(include=set(EngineSettings.model_fields)).encode())
        )
        try:
            self.ready = await self._ready
        except BaseException:
            await self.stop()
            raise
        self.alive = True
        return self.ready

    async def stop(self) -> None:
        """Close the socket, which ends the engine, and wait for it. Generations still open fail with EngineDead."""
        self._stopping = True
        self._lose("the server is shutting down")
        self._transport.close()
        try:
            await asyncio.to_thread(self._process.wait, 10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    async def wait_dead(self) -> None:
        """Returns when the engine is gone without having been asked to."""
        await self._dead.wait()

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
            raise EngineStalled(self._silence())
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
                self._send(Add(first_id, pack_ids(prompt.token_ids), params, cache_salt, priority, owner, level))
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
        if self._owed_since is None:
            self._owed(time.monotonic())
        self._transport.write(wire.encode(message))

    def _owed(self, since: float | None) -> None:
        """Called with every step. The one timer is not moved: it looks again when it fires."""
        self._owed_since = since
        if since is not None and self._watch is None:
            due = since + self.timeout_s
            self._watch = asyncio.get_running_loop().call_at(due, self._look, due)

    def _look(self, due: float) -> None:
        self._watch = None
        if self._owed_since is None or not self.alive:
            return
        now = time.monotonic()
        if now - due > _LATE_S:
            self._owed(now)  # the engine gets its time once more
        elif self.stalled:
            self._give_up()
        else:
            self._owed(self._owed_since)

    def _give_up(self) -> None:
        """Tell the reader of every unfinished sequence, and give back its place: a reader may be slow to leave. An
        engine that wakes up finds the aborts and forgets them."""
        given_up = sorted(self._unfinished)
        _log.error("%s; %d sequences are given up", self._silence(), len(given_up))
        self._told_stalled = True
        self._tell(EngineStalled(self._silence()))
        for sequence_id in given_up:
            self._give_back(sequence_id)
        self._abort(given_up)

    def _tell(self, error: Exception) -> None:
        """Every reader of an unfinished sequence, once."""
        for generation in {self._generations[sequence_id] for sequence_id in self._unfinished}:
            generation.fail(error)

    def _silence(self) -> str:
        return f"the engine has been silent over its work for {self.timeout_s:g} s"

    def _receive(self, message: FromEngine) -> None:
        match message:
            case StepOutput():
                self._deliver(message)
            case Ready():
                if not self._ready.done():
                    self._ready.set_result(message)
            case Failed(text):
                if not self._ready.done():
                    self._ready.set_exception(EngineFailed(text))

    def _deliver(self, step: StepOutput) -> None:
        self.stats = step.stats
        generations = self._generations
        for sequence_id, num_cached in step.cached_tokens.items():
            if generation := generations.get(sequence_id):
                generation.num_cached_tokens[sequence_id - generation.first_id] = num_cached
        for sequence_id, told in step.prompt_logprobs.items():
            if generation := generations.get(sequence_id):
                generation.put_prompt(sequence_id, told)
        for i, (sequence_id, token) in enumerate(
            zip(unpack_ids(step.sequence_ids), unpack_ids(step.tokens), strict=True)
        ):
            if generation := generations.get(sequence_id):  # it may have left already
                generation.put(sequence_id, token, step.logprobs.get(i))
        for sequence_id, reason in step.finished.items():
            if generation := generations.get(sequence_id):
                generation.finish(sequence_id, reason)
                self._unfinished.discard(sequence_id)
        at_rest = not (self._unfinished or step.stats.num_running or step.stats.num_waiting)
        self._owed(None if at_rest else time.monotonic())
        if self._told_stalled:
            self._told_stalled = False
            _log.warning("the engine speaks again")
        if self.on_step is not None:
            self.on_step(step)

    def _disconnected(self) -> None:
        if not self._stopping:
            loading = not self._ready.done()
            self._lose(
                "the engine process died" + (" while loading the model; its last words are above" if loading else "")
            )
            self._dead.set()

    def _lose(self, why: str) -> None:
        """The engine is out of reach: every reader is told."""
        self.alive = False
        if self._watch is not None:
            self._watch.cancel()
        self._tell(EngineDead(why))
        if not self._ready.done():
            self._ready.set_exception(EngineFailed(why))


def _spawn(command: list[str], fd: int) -> subprocess.Popen[bytes]:
    """OpenMP threads that spin while they wait cost nothing on idle cores and a factor of 30 to 80 on busy ones, where
    they burn the time slice of the thread they wait for (measured: 4 against 350 tokens/s beside a busy process)."""
    env = {"OMP_WAIT_POLICY": "passive"} | os.environ
    return subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.DEVNULL, env=env, start_new_session=True)


class _Connection(asyncio.Protocol):
    """Bytes from the engine -> messages."""

    def __init__(self, client: EngineClient) -> None:
        self._client, self._frames = client, frames.FrameBuffer()

    def data_received(self, data: bytes) -> None:
        for payload in self._frames.feed(data):
            self._client._receive(wire.decode_from_engine(payload))

    def connection_lost(self, exc: Exception | None) -> None:
        self._client._disconnected()
