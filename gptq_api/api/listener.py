"""The app behind its middlewares, and who accepts connections for it. Importing this takes as long as a third of torch,
so `server.py` does it while the engine loads."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from starlette.types import ASGIApp

from gptq_api.api.app import build_app
from gptq_api.api.batches import Batches
from gptq_api.api.errors import error_body
from gptq_api.api.loading import Loading
from gptq_api.api.service import Service
from gptq_api.api.traces import Traces
from gptq_api.config import Settings
from gptq_api.edge.accept import AT_ONCE, max_connections
from gptq_api.edge.auth import Authenticator
from gptq_api.edge.connection import MAX_HEADER_BYTES, EdgeProtocol, edge_protocol
from gptq_api.edge.cors import CorsMiddleware
from gptq_api.edge.hosts import HostMiddleware
from gptq_api.edge.listen import in_use
from gptq_api.edge.request_log import RequestMiddleware

KEEP_ALIVE_S = 75
"""An idle connection's life: longer than the 60 s of usual proxies, so that they, who know, close first"""
BACKLOG = 2048
"""Connections that the kernel keeps until they are accepted"""


class Server(uvicorn.Server):
    """uvicorn's accept and connection handling, without its signals, its polling loop and its shutdown."""

    def __init__(self, settings: Settings, auth: Authenticator, traces: Traces | None = None) -> None:
        self.host = settings.host
        self._app = build_app(settings, auth, traces)
        self._loading = Loading(self._app)
        app: ASGIApp = self._loading
        if settings.cors_origin:
            app = CorsMiddleware(app, settings.cors_origin, error_body)
        if not settings.has_keys:
            allowed, origins = settings.allowed_host, settings.cors_origin
            app = HostMiddleware(app, settings.host, allowed, origins, error_body)
        self.requests = RequestMiddleware(app, error_body)
        self.protocol = edge_protocol(settings.header_timeout_s, settings.body_timeout_s, error_body, max_connections())
        super().__init__(
            uvicorn.Config(
                self.requests,
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
        """Accept connections; until `begin` is called they are told that the model loads. Raises PortError where
        another server listens since we bound."""
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        asyncio.get_running_loop().set_exception_handler(self.protocol.crowd.on_loop_error)
        try:
            await self.startup(sockets)
            for sock in sockets:
                sock.listen(BACKLOG)
        except OSError:
            raise in_use(self.host, sockets[0].getsockname()[1]) from None

    def begin(self, service: Service, batches: Batches | None = None) -> None:
        """From now on everything is answered."""
        self._app.state.service = service
        self._app.state.batches = batches
        if batches is not None:
            service.metrics.watch_batches(batches.load)
        self._loading.done = True

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
