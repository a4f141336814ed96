"""uvicorn's h11 protocol with what it lacks against slow and dead clients.

uvicorn only times idle keep-alive connections: a client that sends half a header, or a byte of body per second, holds
its socket for ever. Here headers and bodies have a deadline as a whole (not per byte). What counts is the time in which
we could have read (`patience.py`), and what has come is read before it is said that it did not. A peer that vanished
without a FIN is noticed by the kernel (keep-alive probes, TCP_USER_TIMEOUT). How much is parsed at a time, and what
becomes of a body that nobody wants any more, is EdgeTransport's business.
"""

from __future__ import annotations

import asyncio
import fcntl
import select
import socket
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from gptq_api.edge.accept import AT_ONCE, Crowd
from gptq_api.edge.errors import ErrorBody
from gptq_api.edge.framing import EdgeConnection
from gptq_api.edge.patience import Patience
from gptq_api.edge.transport import EdgeTransport
from gptq_api.edge.turns import Turns

MAX_HEADER_BYTES = 32 * 1024
USER_TIMEOUT_MS = 30_000
READ_BYTES = 16 * 1024
"""that are read of a connection at a time: what one that is not parsed holds at most; asyncio would read 256 KiB"""
_READ = bytearray(READ_BYTES)
READER_GRACE_S = 2.0
"""seconds without a byte read, after which nobody waits for a reader when the server leaves"""
FIRST_PROBE_S, LAST_PROBE_S = 0.02, 5.0
"""seconds between two looks at whether a client that sends no more still reads, at first and in the end"""


def edge_protocol(
    header_timeout_s: float, body_timeout_s: float, body_of: ErrorBody, num_allowed: int = sys.maxsize
) -> type[EdgeProtocol]:
    """The protocol class for uvicorn's `http=`, which wants a class with its own constructor arguments. `num_allowed`:
    connections at a time."""

    class Edge(EdgeProtocol):
        crowd = Crowd(num_allowed)
        turns = Turns()
        patience = Patience()
        header_timeout = header_timeout_s
        body_timeout = body_timeout_s
        error_body = staticmethod(body_of)

    return Edge


class EdgeProtocol(H11Protocol, asyncio.BufferedProtocol):
    crowd: Crowd
    turns: Turns
    patience: Patience
    header_timeout: float
    body_timeout: float
    error_body: ErrorBody
    conn: EdgeConnection
    transport: EdgeTransport

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        # each request's scope["state"] is a copy of this: how a response gets at its connection
        super().__init__(config, server_state, {**app_state, "connection": self}, _loop)
        self.conn = EdgeConnection(h11.SERVER, MAX_HEADER_BYTES)
        self._awaiting: str | None = None
        self._seconds_left = 0.0
        """that the client has for what is awaited"""
        self._deadline: asyncio.TimerHandle | None = None
        """while these seconds run"""
        self._until = 0.0
        """when they are over, by `patience`"""
        self._probe: asyncio.TimerHandle | None = None
        self._num_unread = 0
        """bytes that waited for the peer at the last look, while the server is about to leave"""
        self.filler = b""
        """what may stand between any two pieces of the running answer; set by who sends it"""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(EdgeTransport(transport, self.conn, self._parse, self._watch, self.turns))
        tune(transport.get_extra_info("socket"))
        self._watch()
        if (num_more := len(self.connections) - self.crowd.most) > 0:
            self.crowd.turned_away()
            if num_more > AT_ONCE:
                self.abort()
            else:
                self._refuse(503, "The server has as many open connections as it takes.")
                self.transport.close(linger=True)

    def get_buffer(self, sizehint: int) -> bytearray:
        """asyncio reads into this and calls `buffer_updated` at once, so all connections share one."""
        return _READ

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(_READ[:nbytes]))

    def data_received(self, data: bytes) -> None:
        self.transport.receive(data)

    def _parse(self, data: bytes) -> None:
        super().data_received(data)
        self._see_off()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. Whether it still reads, TCP does not say; see `_look`."""
        self.transport.receive_end()
        self._see_off()
        return not self.transport.is_closing()  # asyncio closes it otherwise

    def on_response_complete(self) -> None:
        super().on_response_complete()  # which begins with the next request, where that has come
        self._watch()
        self._see_off()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._watch()
        if self._probe is not None:
            self._probe.cancel()
        self._unset_keepalive_if_required()  # uvicorn leaves the timer armed after a reset

    def allow_body(self, seconds: float) -> None:
        """The body that is arriving may take so long, where that is longer than usual: it is a large one."""
        if (more := seconds - self.body_timeout) > 0 and self._awaiting == "body":
            self._hold_time()
            self._seconds_left += more
            self._watch()

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

    @contextmanager
    def waiting_for_reader(self, seconds: float, give_up: Callable[[], object]) -> Iterator[None]:
        """Around waiting until the peer has taken what was sent. It is called where that takes longer: of the time in
        which we could have sent it more (`patience.py`), and when the kernel takes nothing from us now."""
        self.patience.begin()
        until, timers = self.patience.now() + seconds, list[asyncio.TimerHandle]()

        def look() -> None:
            left = until - self.patience.now()
            if left > 0 or (not self.transport.is_closing() and can_send(self.transport.get_extra_info("socket"))):
                timers[:] = [self.loop.call_later(max(0.0, left), look)]
            else:
                give_up()

        timers.append(self.loop.call_later(seconds, look))
        try:
            yield
        finally:
            timers[0].cancel()
            self.patience.end()

    def drain(self) -> None:
        """The server is about to leave: from now on a peer that does not read is not waited for."""
        self._look_for_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._num_unread = 0

    def _look_for_reader(self) -> None:
        num_unread = 0
        if self.flow.write_paused or self.transport.is_closing():  # so that nothing is added between two looks
            num_unread = self.transport.get_write_buffer_size()
            num_unread += in_kernel(self.transport.get_extra_info("socket")) if num_unread else 0
        if 0 < self._num_unread <= num_unread:
            self.abort()
        elif self in self.connections:
            self._num_unread = num_unread
            self.loop.call_later(READER_GRACE_S, self._look_for_reader)

    def abort(self) -> None:
        """Cut the connection without waiting for the peer to read what is buffered."""
        if self.transport is not None:
            self.transport.abort()

    def _watch(self) -> None:
        """Let the client's time run for what it owes us, while we read: what it has sent and we have not parsed is our
        delay."""
        self._hold_time()
        if (owed := self._owed()) != self._awaiting:
            self._awaiting = owed
            self._seconds_left = self.header_timeout if owed == "headers" else self.body_timeout
        if owed is not None and self.transport.reading:
            self.patience.begin()
            self._until = self.patience.now() + self._seconds_left
            self._deadline = self.loop.call_later(self._seconds_left, self._at_deadline, owed)

    def _hold_time(self) -> None:
        if self._deadline is not None:
            self._seconds_left = self._until - self.patience.now()
            self._deadline.cancel()
            self._deadline = None
            self.patience.end()

    def _at_deadline(self, awaiting: str) -> None:
        """Late, where the server was slow: then there is time left. What has come and was not read is read first: the
        event loop, which may have looked at its sockets long ago, looks again before this is called again."""
        left = self._until - self.patience.now()
        if left > 0 or (not self.transport.is_closing() and num_unread(self.transport.get_extra_info("socket"))):
            self._deadline = self.loop.call_later(max(0.0, left), self._at_deadline, awaiting)
        else:
            self._too_slow(awaiting)

    def _see_off(self) -> None:
        """Of a client that sends no more, everything has been parsed: a request that is not complete never will be, and
        one that is gets its answer, as long as there is somebody to read it."""
        if not self.transport.has_ended or self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or self.conn.their_state is h11.SEND_BODY:
            self._hang_up()
        elif self._probe is None:
            self._probe = self.loop.call_later(FIRST_PROBE_S, self._look, FIRST_PROBE_S)

    def _look(self, seconds: float) -> None:
        """Whether a client that sends no more still reads. Most have closed their side as a whole: their kernel answers
        whatever we send with a reset. What may be sent while the answer is not ready is "100 Continue", which says
        nothing, and between the events of a stream a comment."""
        self._probe = None
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.abort()
            return
        if self.conn.their_http_version == b"1.1" and not self.flow.write_paused:
            if not self.cycle.response_started:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            elif self.filler:
                self.send_chunk(self.filler)
        self._probe = self.loop.call_later(seconds, self._look, min(2 * seconds, LAST_PROBE_S))

    def _owed(self) -> str | None:
        """What the client has to send before anything else can happen."""
        if self.transport.is_closing():
            return None
        if self.conn.their_state is h11.SEND_BODY:
            return "body"
        begun = self.cycle is None or self.conn.trailing_data[0]
        return "headers" if self.conn.their_state is h11.IDLE and begun else None

    def _too_slow(self, awaiting: str) -> None:
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            seconds = self.header_timeout if awaiting == "headers" else self.body_timeout
            self._refuse(408, f"The request's {awaiting} did not arrive within {seconds:g} s.")
        self.abort() if self.transport.get_write_buffer_size() else self._hang_up()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            invalid = f"This is not valid HTTP/1.1, or its headers are longer than {MAX_HEADER_BYTES} bytes."
            self._refuse(400, self.conn.refusal or invalid)
        self._hang_up()

    def _hang_up(self) -> None:
        """Close. Who works on the request learns at once that its client is gone, although the connection lingers."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        body = self.error_body(status, message)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append((b"retry-after", b"1"))
        reason = HTTPStatus(status).phrase.encode()
        answer: list[h11.Event] = [h11.Response(status_code=status, headers=headers, reason=reason)]
        if not self.conn.wants_no_body:
            answer.append(h11.Data(data=body))
        for event in (*answer, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")


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


def in_kernel(sock: socket.socket) -> int:
    """Bytes that were sent and that the peer's kernel has not acknowledged; 0 where the system does not tell."""
    return _asked(sock, termios.TIOCOUTQ)


def num_unread(sock: socket.socket) -> int:
    """Bytes that came and were not read; 0 where the system does not tell."""
    return _asked(sock, termios.FIONREAD)


def can_send(sock: socket.socket) -> bool:
    """Whether the kernel takes more of what the peer is to get, and the peer has not gone."""
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLOUT)
    return poll.poll(0) == [(sock.fileno(), select.POLLOUT)]


def _asked(sock: socket.socket, request: int) -> int:
    try:
        answer = fcntl.ioctl(sock.fileno(), request, bytes(4))
    except OSError:
        return 0
    return int.from_bytes(answer, sys.byteorder)
