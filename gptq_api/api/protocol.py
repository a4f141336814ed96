"""uvicorn's h11 protocol with what it lacks against slow and dead clients.

uvicorn only times idle keep-alive connections: a client that sends half a header, or a byte of body per second, holds
its socket for ever. Here headers and bodies have a deadline as a whole (not per byte). A peer that vanished without a
FIN is noticed by the kernel (keep-alive probes, TCP_USER_TIMEOUT).
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from gptq_api.api.errors import error_body, error_object

MAX_HEADER_BYTES = 32 * 1024
SEND_BUFFER = 128 * 1024
"""bytes; small, so that what a slow reader has not read waits as merged tokens and not as megabytes in the kernel"""
USER_TIMEOUT_MS = 30_000


def edge_protocol(header_timeout_s: float, body_timeout_s: float) -> type[asyncio.Protocol]:
    """The protocol class for uvicorn's `http=`, which wants a class with its own constructor arguments."""

    class Edge(EdgeProtocol):
        header_timeout = header_timeout_s
        body_timeout = body_timeout_s

    return Edge


class EdgeProtocol(H11Protocol):
    header_timeout: float
    body_timeout: float

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        # each request's scope["state"] is a copy of this: how a response gets at its connection
        super().__init__(config, server_state, {**app_state, "connection": self}, _loop)
        self._deadline: asyncio.TimerHandle | None = None
        self._awaiting: str | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        tune(transport.get_extra_info("socket"))
        self._watch()

    def data_received(self, data: bytes) -> None:
        # h11 looks at its limit only when headers are incomplete: let it look before a whole bomb is there
        while len(data) > MAX_HEADER_BYTES // 2 and self.conn.their_state is h11.IDLE:
            super().data_received(data[: MAX_HEADER_BYTES // 2])
            data = data[MAX_HEADER_BYTES // 2 :]
            if self.transport.is_closing():
                return
        super().data_received(data)
        self._watch(fresh_data=True)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arm(None)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves the timer armed after a reset

    def send_chunk(self, data: bytes) -> bool:
        """Write a piece of the running answer at once, as one HTTP chunk. False where that cannot be: the peer does
        not take more now, or does not know chunks. What is sent to a peer that has gone is gone.

        For streams, whose every token is a piece: h11 would give it the same frame, at a third of what a token costs.
        """
        cycle = self.cycle
        assert cycle is not None
        if cycle.disconnected:
            return True
        if self.flow.write_paused or self.conn.their_http_version != b"1.1":
            return False
        assert cycle.response_started and not cycle.response_complete
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def abort(self) -> None:
        """Cut the connection without waiting for the peer to read what is buffered."""
        if self.transport is not None:
            self.transport.abort()

    def _watch(self, fresh_data: bool = False) -> None:
        """Arm or disarm the deadline for what the client owes us now."""
        state = self.conn.their_state
        if self.transport.is_closing():
            self._arm(None)
        elif state is h11.SEND_BODY:
            self._arm("body")
        elif state is h11.IDLE and (self.cycle is None or (fresh_data and self.conn.trailing_data[0])):
            self._arm("headers")
        elif state is not h11.IDLE or self._awaiting == "body":
            self._arm(None)

    def _arm(self, awaiting: str | None) -> None:
        if awaiting == self._awaiting:
            return
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._awaiting = awaiting
        if awaiting is not None:
            seconds = self.header_timeout if awaiting == "headers" else self.body_timeout
            self._deadline = self.loop.call_later(seconds, self._too_slow, awaiting, seconds)

    def _too_slow(self, awaiting: str, seconds: float) -> None:
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(408, f"The request's {awaiting} did not arrive within {seconds:g} s.")
        self.abort() if self.transport.get_write_buffer_size() else self.transport.close()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(400, f"This is not valid HTTP/1.1, or its headers are longer than {MAX_HEADER_BYTES} bytes.")
        self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        body = error_body(error_object(status, message))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        reason = b"Request Timeout" if status == 408 else b"Bad Request"
        for event in (h11.Response(status_code=status, headers=headers, reason=reason), h11.Data(data=body)):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write(self.conn.send(h11.EndOfMessage()) or b"")


def tune(sock: socket.socket) -> None:
    """Socket options of an accepted connection. The send buffer is inherited from the listening socket."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 30),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", USER_TIMEOUT_MS),
    ):
        if (option := getattr(socket, name, None)) is not None:  # not every system has every one of them
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
