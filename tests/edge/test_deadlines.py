"""A deadline that passes while the event loop knows nothing yet of what has come: that is read first."""

from __future__ import annotations

import asyncio
import math
import selectors
import socket
from collections.abc import Coroutine
from typing import Any

import h11
import pytest
import uvicorn
from uvicorn.server import ServerState

from gptq_api.edge import patience
from gptq_api.edge.connection import MAX_HEADER_BYTES, edge_protocol

TIMEOUT_S = 60.0
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


async def answer_to(begun: bytes, rest: bytes) -> bytes:
    """What a client gets that sent `begun`, and `rest` while the server stood still until its time was over."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Loop)
    config = uvicorn.Config(app, interface="asgi3", ws="none", lifespan="off", log_config=None)
    config.h11_max_incomplete_event_size = MAX_HEADER_BYTES
    config.load()
    state = ServerState()
    make: Any = edge_protocol(TIMEOUT_S, TIMEOUT_S, lambda status, message: message.encode())
    server = await loop.create_server(lambda: make(config, state, {}), "127.0.0.1", 0)
    with socket.create_connection(server.sockets[0].getsockname()) as client:
        client.sendall(begun)
        while not (state.connections and all(has_begun(one, begun) for one in state.connections)):
            await asyncio.sleep(0)
        client.sendall(rest)
        loop.ahead_s += 2 * TIMEOUT_S
        loop.selector.misses_next = True
        client.setblocking(False)
        data = b""
        while part := await loop.sock_recv(client, 4096):
            data += part
    server.close()
    return data


def has_begun(connection: Any, begun: bytes) -> bool:
    """Whether that was read and parsed."""
    conn = connection.conn
    return begun == conn.trailing_data[0] or (HEAD in begun and conn.their_state is h11.SEND_BODY)


def ran(test: Coroutine[Any, Any, bytes]) -> bytes:
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
