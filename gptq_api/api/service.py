"""What a request needs besides itself: the engine, the text side, the settings. One per server."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from gptq_api import __version__
from gptq_api.api.errors import ApiError, body_stalled, rate_limited, server_full, shutting_down, unavailable
from gptq_api.api.gate import Gate
from gptq_api.api.metrics import Metrics
from gptq_api.api.speed import SpeedLine
from gptq_api.api.traces import Traces
from gptq_api.config import Settings
from gptq_api.edge.auth import Authenticator
from gptq_api.edge.in_flight import Bodies
from gptq_api.edge.limits import LimitReached
from gptq_api.edge.request_log import RequestRecord
from gptq_api.engine.client import EngineClient
from gptq_api.engine.places import PlacesTaken
from gptq_api.grammar.checker import GrammarChecker
from gptq_api.text.chat import TemplateFacts
from gptq_api.text.process import TextProcess
from gptq_api.text.tokens import Tokens
from gptq_api.types import StepOutput

T = TypeVar("T")
PREPARED_AT_ONCE = 4
"""Requests of one caller; enough that the text process always has one while another is admitted"""
BODY_BYTES_PER_TOKEN = 64
"""of the longest prompt: a word and a half, all of it in the longest escapes, and what stands around it"""
MIN_BODY_BYTES = 2 * 2**20
"""that a body may have whatever the context is: many prompts, tools, blocks that are skipped"""
MIN_BYTES_OF_BODIES = 32 * 2**20
"""that bodies may hold together, unless four of them are more"""

_FAULTS = {
    "dead": "The engine is not running.",
    "loading": "The engine died and is being started again.",
    "stalled": "The engine does not answer.",
}


@dataclass(slots=True, eq=False)
class Service:
    settings: Settings
    engine: EngineClient
    text: TextProcess
    tokenizer: Tokens
    template: TemplateFacts
    model_name: str
    auth: Authenticator = field(default_factory=Authenticator)
    traces: Traces | None = None
    leaving: bool = False
    """whether it was told to stop: who asks whether it is ready is told no"""
    draining: bool = False
    """whether nothing is admitted any more"""
    metrics: Metrics = field(init=False)
    fingerprint: str = field(init=False)
    """of all that decides which text a seed gives: this program, the checkpoint, device, types"""
    max_tokens: int = field(init=False)
    """longest prompt plus answer that can ever run"""
    max_body_bytes: int = field(init=False)
    bodies: Bodies = field(init=False)
    grammars: GrammarChecker = field(init=False)
    _text_thread: ThreadPoolExecutor = field(init=False)
    _gate: Gate = field(init=False)

    def __post_init__(self) -> None:
        ready = self.engine.ready
        self.metrics = Metrics(self.model_name, self.engine, self.auth)
        speed = SpeedLine(self.engine)

        def on_step(step: StepOutput) -> None:
            self.metrics.on_step(step)
            speed.on_step(step)

        self.engine.on_step = on_step
        self._keys_changed()
        self._gate = Gate(PREPARED_AT_ONCE)
        parts = (__version__, ready.checkpoint, ready.device, ready.dtype, self.settings.kv_cache_dtype)
        self.fingerprint = "fp_" + hashlib.sha256(" ".join(parts).encode()).hexdigest()[:10]
        self.max_tokens = ready.max_model_len
        self.max_body_bytes = self.settings.max_body_bytes or max(
            MIN_BODY_BYTES, BODY_BYTES_PER_TOKEN * self.max_tokens
        )
        self.bodies = Bodies(max(MIN_BYTES_OF_BODIES, 4 * self.max_body_bytes), body_stalled)
        self.grammars = GrammarChecker(self.tokenizer.special_contents)
        # one thread: long texts are not spelled on the event loop
        self._text_thread = ThreadPoolExecutor(1, thread_name_prefix="text")

    @property
    def names(self) -> list[str]:
        """Its own, then the aliases."""
        return [self.model_name, *(name for name in self.settings.model_alias if name != self.model_name)]

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 where it is the name of another model."""
        if not (name is None or name in self.names or self.settings.accept_any_model):
            raise ApiError(
                404,
                f"The model '{name[:100]}' does not exist; this server serves '{self.model_name}'.",
                param="model",
                code="model_not_found",
            )

    def leave(self) -> None:
        """Not ready from now on; requests are answered as before."""
        self.leaving = True

    def drain(self) -> None:
        """Nothing new is admitted from now on."""
        self.draining = True
        self.engine.end_restarts()
        self.bodies.cut(shutting_down)

    async def watch_keys(self) -> None:
        """Returns when it is cancelled, or at once where keys do not change."""
        await self.auth.watch(self._keys_changed)

    def _keys_changed(self) -> None:
        self.engine.places.shared = self.auth.may_differ(self.settings.host)

    @asynccontextmanager
    async def preparing(self, record: RequestRecord) -> AsyncIterator[None]:
        """Around the work before admission, so that a crowd at the door is refused before it costs anything, and does
        not stand before those of others.

        Raises ApiError 503 where nothing is admitted any more, or not now; 429 where the house is full already, or the
        caller's part of it, or a limit of the caller's key is reached.
        """
        if (refusal := self.refusal()) is not None:
            raise refusal
        with self._accounted(record), self._coming(record):
            async with self._gate.through(record.caller.owner):
                yield

    def check_room(self, record: RequestRecord) -> None:
        """Raises what `preparing` would raise now, without counting as a request."""
        if (refusal := self.refusal()) is not None:
            raise refusal
        if (account := record.caller.account) is not None:
            try:
                account.begin(time.monotonic())
            except LimitReached as reached:
                raise self.limited(reached) from None
            account.give_up(time.monotonic(), counts=False)
        with self._coming(record):
            pass

    @contextmanager
    def _coming(self, record: RequestRecord) -> Iterator[None]:
        places, owner = self.engine.places, record.caller.owner
        try:
            places.come(owner)
        except PlacesTaken as taken:
            raise self.full(taken) from None
        try:
            yield
        finally:
            places.arrive(owner)

    @contextmanager
    def _accounted(self, record: RequestRecord) -> Iterator[None]:
        """A request of a named key. Where it is refused though nothing is wrong with it, it does not count."""
        account = record.caller.account
        if account is None:
            yield
            return
        try:
            account.begin(time.monotonic())
        except LimitReached as reached:
            raise self.limited(reached) from None
        try:
            yield
        except BaseException as error:
            refused = isinstance(error, ApiError) and error.status_code in (429, 503)
            account.give_up(time.monotonic(), counts=not refused)
            raise
        account.usage.requests += 1
        record.at_end.callback(lambda: account.end(time.monotonic()))

    def limited(self, reached: LimitReached) -> ApiError:
        """A 429 that is counted."""
        self.metrics.rejected["rate_limit"].inc()
        return rate_limited(reached)

    def full(self, taken: PlacesTaken) -> ApiError:
        """A 429 that is counted."""
        self.metrics.rejected["share_full" if taken.share else "server_full"].inc()
        return server_full(taken)

    def refusal(self) -> ApiError | None:
        """Why nothing is admitted, a 503 that is counted; None where it is."""
        if self.draining:
            error = shutting_down()
        elif (fault := self.engine.fault) is not None:
            error = unavailable(_FAULTS[fault], f"engine_{fault}", self.engine.retry_after_s)
        else:
            return None
        self.metrics.rejected["unavailable"].inc()
        return error

    async def in_text_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._text_thread, work)

    def close(self) -> None:
        self.grammars.close()
        self.text.close()
        self._text_thread.shutdown(wait=False, cancel_futures=True)


def get_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def get_record(request: Request) -> RequestRecord:
    record: RequestRecord = request.scope["state"]["record"]
    return record


async def _service(request: Request) -> Service:  # FastAPI would give a plain function a thread of its own
    return get_service(request)


async def _record(request: Request) -> RequestRecord:
    return get_record(request)


ServiceDep = Annotated[Service, Depends(_service)]
RecordDep = Annotated[RequestRecord, Depends(_record)]
