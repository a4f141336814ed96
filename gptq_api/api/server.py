"""`run(settings)`: start, open the port, serve, drain, leave with the right exit status.

loading ──ready──> serving ──signal──> draining ──all done──> 0
   │ failed ──> 1     │ engine died        │ drain_timeout_s: the rest get an error event ──> 0
   │ SIGTERM ──> 0    └──> 70              └ second signal: the same, at once ──> 128 + signal
   └ ^C ──> 130

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

import structlog
import uvicorn
from starlette.types import ASGIApp

from gptq_api import __version__, exits
from gptq_api.api.app import build_app
from gptq_api.api.errors import error_body, shutting_down
from gptq_api.api.service import Service
from gptq_api.config import Settings
from gptq_api.edge.accept import AT_ONCE, max_connections
from gptq_api.edge.auth import Authenticator
from gptq_api.edge.connection import MAX_HEADER_BYTES, EdgeProtocol, edge_protocol
from gptq_api.edge.cors import ANY, CorsMiddleware
from gptq_api.edge.hosts import HostMiddleware
from gptq_api.edge.keys import KeyFile
from gptq_api.edge.listen import bind, in_use
from gptq_api.edge.request_log import RequestMiddleware
from gptq_api.engine.client import EngineClient
from gptq_api.logs import answer
from gptq_api.text.folder import checkpoint_folder
from gptq_api.text.process import TextProcess

log = structlog.get_logger()

KEEP_ALIVE_S = 75
"""An idle connection's life: longer than the 60 s of usual proxies, so that they, who know, close first"""
BACKLOG = 2048
"""Connections that the kernel keeps until they are accepted"""
SWITCH_S = 0.001
"""How long a thread that works on a large body may keep the event loop waiting; Python's 0.005 is felt"""
CLOSE_S = 0.3
"""How long connections have to close when we are in a hurry"""
FAREWELL_S = 1.0
"""How long clients have to read their error event, and probes to see a 503, before the process goes"""
EXIT_S, STOP_S = 10.0, 0.5
"""How long the engine has to leave, and when we are in a hurry"""


def run(settings: Settings) -> int:
    """Serve until told to stop. Returns one of `exits`. Raises UserError where it cannot start."""
    sys.setswitchinterval(SWITCH_S)
    _allow_connections()
    return asyncio.run(_run(settings, _authenticator(settings)))


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


async def _run(settings: Settings, auth: Authenticator) -> int:
    started = time.monotonic()
    signals = _Signals()
    sockets = bind(settings.host, settings.port)  # taken now, so that a port in use is no surprise after the loading
    engine = EngineClient(settings, settings.restart_engine, kill_stalled=settings.on_engine_stall == "kill")
    loading = asyncio.ensure_future(_load(settings, engine, auth))
    stopped = asyncio.ensure_future(signals.first())
    await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        return await _stop_loading(loading, signals)
    stopped.cancel()
    service = loading.result()
    try:
        gc.collect()
        gc.freeze()  # what lives as long as the server is not looked at again in the middle of streams
        seconds = f"{time.monotonic() - started:.1f} s"
        log.info(engine.ready.description)
        log.info(service.template.source)
        if warning := service.tokenizer.without_rows(engine.ready.vocab_size):
            log.warning(warning)
        return await _serve(service, sockets, signals, seconds)
    finally:
        service.close()
        await engine.stop(STOP_S if signals.num_received > 1 or engine.fault else EXIT_S)


async def _stop_loading(loading: asyncio.Future[Service], signals: _Signals) -> int:
    loading.cancel()
    await asyncio.wait({loading}, timeout=STOP_S)
    if loading.done() and not loading.cancelled() and (error := loading.exception()):
        raise error  # it was on its way already, and says more than that we were told to stop
    status = exits.INTERRUPTED if signals.last == signal.SIGINT else exits.DONE
    log.info("stopped while loading", exit_status=status)
    return status


async def _load(settings: Settings, engine: EngineClient, auth: Authenticator) -> Service:
    """The tokenizer here and the weights there, at the same time."""
    folder = checkpoint_folder(settings.model_path)
    name = settings.served_model_name or ("demo" if settings.model_path == "demo" else folder.resolve().name)
    log.info(f"loading {name}", version=__version__)

    text = TextProcess(folder, template=settings.chat_template, model_name=name)
    starting = asyncio.ensure_future(engine.start())
    try:
        tokens, template = await text.start()
        await starting
    except BaseException:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        if engine.alive:
            await engine.stop(STOP_S)
        text.close()
        raise
    return Service(settings, engine, text, tokens, template, name, auth)


async def _serve(service: Service, sockets: list[socket.socket], signals: _Signals, load_time: str) -> int:
    app: ASGIApp = build_app(service)
    if service.settings.cors_origin:
        app = CorsMiddleware(app, service.settings.cors_origin, error_body)
    if not service.settings.has_keys:
        allowed, origins = service.settings.allowed_host, service.settings.cors_origin
        app = HostMiddleware(app, service.settings.host, allowed, origins, error_body)
    requests = RequestMiddleware(app, error_body)
    server = Server(requests, service.settings)
    await server.open(sockets)
    host, port = service.settings.host, sockets[0].getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    if ANY in service.settings.cors_origin and not service.settings.has_keys:
        log.warning("every web page that a browser here shows may use this server: --cors-origin * without --api-key")
    answer(f"serving {service.model_name} at http://{shown}:{port}/v1", ready_after=load_time)
    watching = asyncio.ensure_future(service.watch_keys())
    stopped, dead = asyncio.ensure_future(signals.first()), asyncio.ensure_future(service.engine.wait_dead())
    await asyncio.wait({stopped, dead}, return_when=asyncio.FIRST_COMPLETED)
    until = time.monotonic() + service.settings.drain_timeout_s
    if not dead.done():
        server.drain()
        await _drain(service, requests, signals, dead)
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


async def _drain(service: Service, requests: RequestMiddleware, signals: _Signals, dead: asyncio.Future[None]) -> None:
    """New requests are refused, running ones finish; what is left at the deadline is told so and cut."""
    service.draining = True
    service.engine.end_restarts()
    service.bodies.cut(shutting_down)
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


class Server(uvicorn.Server):
    """uvicorn's accept and connection handling, without its signals, its polling loop and its shutdown."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.host = settings.host
        self.protocol = edge_protocol(settings.header_timeout_s, settings.body_timeout_s, error_body, max_connections())
        super().__init__(
            uvicorn.Config(
                app,
                http=self.protocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                proxy_headers=False,
                server_header=False,
                date_header=False,  # uvicorn's is made by polling; the middleware's is not
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                backlog=AT_ONCE,
                log_config=None,
            )
        )

    async def open(self, sockets: list[socket.socket]) -> None:
        """Accept connections. Raises PortError where another server listens since we bound."""
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        asyncio.get_running_loop().set_exception_handler(self.protocol.crowd.on_loop_error)
        try:
            await self.startup(sockets)
            for sock in sockets:
                sock.listen(BACKLOG)
        except OSError:
            raise in_use(self.host, sockets[0].getsockname()[1]) from None

    def drain(self) -> None:
        for connection in self.server_state.connections:
            assert isinstance(connection, EdgeProtocol)
            connection.drain()

    async def close(self) -> None:
        """No new connections; idle ones are closed, busy ones after their answer."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        while self.server_state.connections:  # noqa: ASYNC110  (a set of uvicorn's, for a moment at the very end)
            await asyncio.sleep(0.01)
