"""`run(settings)`: open the port, load, serve, drain, leave with the right exit status.

loading ──ready──> serving ──signal──> draining ──all done──> 0       (loading: the port is open, see loading.py)
   │ failed ──> 1     │ engine died        │ drain_timeout_s: the rest get an error event ──> 0
   │ SIGTERM ──> 0    └──> 70              └ second signal: the same, at once ──> 128 + signal
   └ ^C ──> 130

Between the signal and draining lies `drain_delay_s`: the server is not ready any more and refuses nothing yet.

An engine that may be started again (`--restart-engine`) is no matter of these states: the server goes on serving, with
503 for requests, until the engine is ready or given up.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from gptq_api import __version__, exits
from gptq_api.api.traces import Traces
from gptq_api.batch.folder import BatchFolder
from gptq_api.batch.store import Store
from gptq_api.config import Settings
from gptq_api.edge.auth import Authenticator
from gptq_api.edge.keys import KeyFile
from gptq_api.edge.listen import bind
from gptq_api.engine.client import EngineClient
from gptq_api.logs import answer
from gptq_api.text.folder import checkpoint_folder
from gptq_api.text.process import TextProcess

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from gptq_api.api.batches import Batches
    from gptq_api.api.listener import Server
    from gptq_api.api.service import Service
    from gptq_api.batch.records import BatchRecord, End

T = TypeVar("T")
log = structlog.get_logger()

SWITCH_S = 0.001
"""How long a thread that works on a large body may keep the event loop waiting; Python's 0.005 is felt"""
CLOSE_S = 0.3
"""How long connections have to close when we are in a hurry"""
FAREWELL_S = 1.0
"""How long clients have to read their error event, and probes to see a 503, before the process goes"""
TRACES_S = 2.0
"""How long traces may take to be sent at the end"""
EXIT_S, STOP_S = 10.0, 0.5
"""How long the engine has to leave, and when we are in a hurry"""


def run(settings: Settings) -> int:
    """Serve until told to stop. Returns one of `exits`. Raises UserError where it cannot start."""
    sys.setswitchinterval(SWITCH_S)
    _allow_connections()
    auth = _authenticator(settings)
    traces = Traces() if settings.otel_traces else None
    try:
        return asyncio.run(_run(settings, auth, traces))
    finally:
        if traces is not None:
            traces.close(TRACES_S)


def _allow_connections() -> None:
    """As many descriptors as we may have: the usual soft limit of 1024 is 1000 streams."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _authenticator(settings: Settings) -> Authenticator:
    """Raises KeyFileError."""
    if settings.api_key_file is None:
        return Authenticator(settings.api_key)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the file is watched
    file = KeyFile(settings.api_key_file)
    auth = Authenticator(settings.api_key, file)
    if file.is_open_to_all():
        log.warning(f"every user of this machine may read the keys in {file.path}: chmod o-r {file.path}")
    return auth


async def _run(settings: Settings, auth: Authenticator, traces: Traces | None) -> int:
    started = time.monotonic()
    signals = _Signals()
    store = None if settings.batch_dir is None else Store(BatchFolder(settings.batch_dir))
    sockets = bind(settings.host, settings.port)  # taken now, so that a port in use is no surprise after the loading
    engine = EngineClient(settings, settings.restart_engine, kill_stalled=settings.on_engine_stall == "kill")
    loading = asyncio.ensure_future(
        load(
            settings,
            engine,
            auth,
            lambda: _open(settings, auth, traces, sockets),
            traces,
            close=lambda one: one.close(),
        )
    )
    stopped = asyncio.ensure_future(signals.first())
    await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        return await _stop_loading(loading, signals)
    stopped.cancel()
    service, server = loading.result()
    batches = None
    try:
        if store is not None:
            batches = new_batches(store, service, server.requests, settings.batch_disk_mib)
        gc.collect()
        gc.freeze()  # what lives as long as the server is not looked at again in the middle of streams
        seconds = f"{time.monotonic() - started:.1f} s"
        log.info(engine.ready.description)
        log.info(service.template.source)
        if warning := service.tokenizer.without_rows(engine.ready.vocab_size):
            log.warning(warning)
        return await _serve(service, server, batches, sockets, signals, seconds)
    finally:
        if batches is not None:
            await batches.stop()
            batches.close()
        service.close()
        await engine.stop(STOP_S if signals.num_received > 1 or engine.fault else EXIT_S)


async def _stop_loading(loading: asyncio.Future[tuple[Service, Server]], signals: _Signals) -> int:
    loading.cancel()
    await asyncio.wait({loading}, timeout=STOP_S)
    if loading.done() and not loading.cancelled() and (error := loading.exception()):
        raise error  # it was on its way already, and says more than that we were told to stop
    status = exits.INTERRUPTED if signals.last == signal.SIGINT else exits.DONE
    log.info("stopped while loading", exit_status=status)
    return status


async def load(
    settings: Settings,
    engine: EngineClient,
    auth: Authenticator,
    opened: Callable[[], Coroutine[Any, Any, T]],
    traces: Traces | None = None,
    close: Callable[[T], Coroutine[Any, Any, None]] | None = None,
) -> tuple[Service, T]:
    """The weights and the tokenizer, in processes of their own, and what is `opened` here at the same time, such as the
    port; `close`: what becomes of that where the model cannot be loaded."""
    folder = checkpoint_folder(settings.model_path)
    name = settings.served_model_name or ("demo" if settings.model_path == "demo" else folder.resolve().name)
    log.info(f"loading {name}", version=__version__)

    text = TextProcess(folder, template=settings.chat_template, model_name=name)
    starting = asyncio.ensure_future(engine.start())
    opening = asyncio.ensure_future(opened())
    try:
        await asyncio.sleep(0)  # the engine takes longest: its process comes first
        tokens, template = await text.start()
        rest = await opening
        await starting
    except BaseException:
        starting.cancel()
        is_open = opening.done() and not opening.cancelled() and opening.exception() is None
        opening.cancel()
        await asyncio.gather(starting, opening, return_exceptions=True)
        if is_open and close is not None:
            await _within(CLOSE_S, close(opening.result()))
        if engine.alive:
            await engine.stop(STOP_S)
        text.close()
        raise
    from gptq_api.api.service import Service

    return Service(settings, engine, text, tokens, template, name, auth, traces), rest


def new_batches(
    store: Store,
    service: Service,
    app: ASGIApp,
    disk_mib: int,
    finish: Callable[[Store, BatchRecord, End], None] = Store.finish,
) -> Batches:
    """`app`: with its middlewares; `disk_mib`: that files and answers may take; `finish`: as in Batches."""
    from gptq_api.api.batches import Batches

    return Batches(store, service, app, disk_mib * 2**20, finish)


async def _open(settings: Settings, auth: Authenticator, traces: Traces | None, sockets: list[socket.socket]) -> Server:
    """Raises PortError."""
    server = await asyncio.to_thread(_prepared, settings, auth, traces)
    await server.open(sockets)
    return server


def _prepared(settings: Settings, auth: Authenticator, traces: Traces | None) -> Server:
    gc.disable()  # as long as what stays is imported
    try:
        from gptq_api.api.listener import Server

        server = Server(settings, auth, traces)
    finally:
        gc.enable()
    gc.collect()
    gc.freeze()  # so that collecting at the end, when somebody waits, is short
    return server


async def _serve(
    service: Service,
    server: Server,
    batches: Batches | None,
    sockets: list[socket.socket],
    signals: _Signals,
    load_time: str,
) -> int:
    server.begin(service, batches)
    if batches is not None:
        await batches.start()
    host, port = service.settings.host, sockets[0].getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    if "*" in service.settings.cors_origin and not service.settings.has_keys:
        log.warning("every web page that a browser here shows may use this server: --cors-origin * without --api-key")
    answer(f"serving {service.model_name} at http://{shown}:{port}/v1", ready_after=load_time)
    watching = asyncio.ensure_future(service.watch_keys())
    stopped, dead = asyncio.ensure_future(signals.first()), asyncio.ensure_future(service.engine.wait_dead())
    await asyncio.wait({stopped, dead}, return_when=asyncio.FIRST_COMPLETED)
    if not dead.done():
        await _leave(service, signals, dead)
    until = time.monotonic() + service.settings.drain_timeout_s
    if not dead.done():
        if batches is not None:
            await batches.stop()  # they go on when the server is started again
        server.drain()
        await _drain(service, server, signals, dead)
    status = exits.DONE
    if dead.done():
        log.error(f"{service.engine.why_dead}; every open request has been told")
        # streams are ending by themselves; for this long, probes see why
        await _within(FAREWELL_S, signals.second())
        status = exits.ENGINE_DEAD
    elif signals.num_received > 1:
        status = exits.cut_short(signals.last)
    stopped.cancel()
    dead.cancel()
    watching.cancel()
    await _close(server, signals, until - time.monotonic() if status == exits.DONE else 0)
    log.info("stopped", exit_status=status)
    return status


async def _leave(service: Service, signals: _Signals, dead: asyncio.Future[None]) -> None:
    """Not ready any more, and everything else as before, until who routes requests here has seen it."""
    service.leave()
    seconds = service.settings.drain_delay_s
    if not seconds or signals.last == signal.SIGINT:
        return
    log.info(f"leaving: not ready from now on, and requests are answered for {seconds:g} s more")
    second = asyncio.ensure_future(signals.second())
    await asyncio.wait({second, dead}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    second.cancel()


async def _drain(service: Service, server: Server, signals: _Signals, dead: asyncio.Future[None]) -> None:
    """New requests are refused, running ones finish; what is left at the deadline is told so and cut."""
    service.drain()
    requests = server.requests
    seconds = service.settings.drain_timeout_s
    log.info(f"shutting down: {requests.num_requests} requests in flight have {seconds:g} s; ^C again to cut them off")
    idle, second = asyncio.ensure_future(requests.idle()), asyncio.ensure_future(signals.second())
    await asyncio.wait({idle, second, dead}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    second.cancel()
    if not idle.done() and not dead.done():
        log.warning(f"cutting {requests.num_requests} requests off")
        stopping = asyncio.ensure_future(service.engine.stop(STOP_S))
        await asyncio.wait({idle}, timeout=STOP_S if signals.num_received > 1 else FAREWELL_S)
        await stopping
    idle.cancel()


async def _close(server: Server, signals: _Signals, seconds: float) -> None:
    """Answers that are whole have so long to be read, unless a second signal comes."""
    closing, second = asyncio.ensure_future(server.close()), asyncio.ensure_future(signals.second())
    await asyncio.wait({closing}, timeout=CLOSE_S)
    await asyncio.wait({closing, second}, timeout=max(0, seconds - CLOSE_S), return_when=asyncio.FIRST_COMPLETED)
    closing.cancel()
    second.cancel()


async def _within(seconds: float, work: object) -> None:
    task = asyncio.ensure_future(work)  # type: ignore[call-overload]
    await asyncio.wait({task}, timeout=seconds)
    task.cancel()


class _Signals:
    """SIGTERM and SIGINT as events of the loop."""

    def __init__(self) -> None:
        self.num_received = 0
        self.last = 0
        self._first, self._second = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._receive, number)

    def _receive(self, number: int) -> None:
        self.num_received += 1
        self.last = number
        (self._first if self.num_received == 1 else self._second).set()

    async def first(self) -> None:
        await self._first.wait()

    async def second(self) -> None:
        await self._second.wait()
