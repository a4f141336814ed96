"""A deadline that passes while the event loop knows nothing yet of what its client has sent or read: it looks first."""

from __future__ import annotations

import asyncio
import contextlib
import math
import selectors
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import h11
import pytest
import uvicorn
from uvicorn.server import ServerState

from gptq_api.edge import patience
from gptq_api.edge.connection import MAX_HEADER_BYTES, can_send, edge_protocol

T = TypeVar("T")

TIMEOUT_S = 60.0
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
PIECE = 16 * 2**10
"""bytes"""
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 4\r\n\r\n"


class LateSelector(selectors.DefaultSelector):
    """Sees nothing once, when it is told so: as epoll does that was interrupted until its timeout was over, or one
    whose process lost the processor before it looked at the clock."""

    misses_next = False

    def select(self, timeout: float | None = None) -> list[Any]:
        if self.misses_next:
            self.misses_next = False
            return []
        return super().select(timeout)


class Loop(asyncio.SelectorEventLoop):
    """Whose clock can be put forward."""

    def __init__(self) -> None:
        self.selector, self.ahead_s = LateSelector(), 0.0
        super().__init__(self.selector)

    def time(self) -> float:
        return super().time() + self.ahead_s


async def app(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def connected(app: Any, begun: bytes, done: Callable[[Any], bool]) -> AsyncIterator[tuple[socket.socket, Any]]:
    """A client that has sent `begun`, and its connection, of which that is `done`."""
    loop = asyncio.get_running_loop()
    config = uvicorn.Config(app, interface="asgi3", ws="none", lifespan="off", log_config=None)
    config.h11_max_incomplete_event_size = MAX_HEADER_BYTES
    config.load()
    state = ServerState()
    make: Any = edge_protocol(TIMEOUT_S, TIMEOUT_S, lambda status, message: message.encode())
    server = await loop.create_server(lambda: make(config, state, {}), "127.0.0.1", 0)
    with socket.create_connection(server.sockets[0].getsockname()) as client:
        client.sendall(begun)
        while not (state.connections and done(*state.connections)):
            await asyncio.sleep(0)
        client.setblocking(False)
        (connection,) = state.connections
        yield client, connection
    server.close()


def stand_still() -> None:
    """The server does, until time is over."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Loop)
    loop.ahead_s += 2 * TIMEOUT_S
    loop.selector.misses_next = True


async def received(client: socket.socket) -> bytes:
    """All there is to come."""
    data = b""
    while part := await asyncio.get_running_loop().sock_recv(client, 2**20):
        data += part
    return data


async def answer_to(begun: bytes, rest: bytes) -> bytes:
    """What a client gets that sent `begun`, and `rest` while the server stood still until its time was over."""
    async with connected(app, begun, lambda connection: has_begun(connection, begun)) as (client, _):
        client.sendall(rest)
        stand_still()
        return await received(client)


def has_begun(connection: Any, begun: bytes) -> bool:
    """Whether that was read and parsed."""
    conn = connection.conn
    return begun == conn.trailing_data[0] or (HEAD in begun and conn.their_state is h11.SEND_BODY)


def ran(test: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(test)


@pytest.fixture(autouse=True)
def every_second_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a pause: then time is over, however little of it the server has seen."""
    monkeypatch.setattr(patience, "MOST_S", math.inf)


@pytest.mark.parametrize("cut", [0, 10, len(HEAD), len(HEAD) + 2])
def test_what_has_come_is_read_before_its_client_is_given_up(cut: int) -> None:
    request = HEAD + b"body"
    told = ran(answer_to(request[:cut], request[cut:]))
    assert told.startswith(b"HTTP/1.1 200 "), told


def test_what_is_not_enough_is_refused_when_it_was_read() -> None:
    told = ran(answer_to(HEAD, b"bod"))
    assert told.startswith(b"HTTP/1.1 408 "), told


class Stream:
    """An app that has sent an answer, and waits for its reader before it ends that."""

    def __init__(self) -> None:
        self.is_waiting = self.given_up = False
        self.num_sent = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        connection = scope["state"]["connection"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        while not connection.flow.write_paused:  # as streams are: little at a time
            await send({"type": "http.response.body", "body": bytes(PIECE), "more_body": True})
            self.num_sent += PIECE
        with connection.waiting_for_reader(TIMEOUT_S, lambda: self._give_up(connection)):
            self.is_waiting = True
            await send({"type": "http.response.body", "body": b""})

    def _give_up(self, connection: Any) -> None:
        self.given_up = True
        connection.abort()


def test_a_reader_that_has_read_meanwhile_is_sent_the_rest() -> None:
    async def test() -> None:
        app = Stream()
        async with connected(app, GET, lambda _: app.is_waiting) as (client, connection):
            num = 0
            while not can_send(connection.transport.get_extra_info("socket")):
                with contextlib.suppress(BlockingIOError):
                    num += len(client.recv(2**20))
            stand_still()
            num += len(await received(client))
        assert not app.given_up and num > app.num_sent > 2**17

    ran(test())


def test_a_reader_that_has_not_is_given_up() -> None:
    async def test() -> bool:
        app = Stream()
        async with connected(app, GET, lambda _: app.is_waiting) as _:
            stand_still()
            while not app.given_up:
                await asyncio.sleep(0)
        return app.given_up

    assert ran(asyncio.wait_for(test(), 60 * TIMEOUT_S))
