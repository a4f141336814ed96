"""EdgeProtocol on a transport that only notes what it is told: what is parsed in which turn of the loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.server import ServerState

from gptq_api.edge.connection import MAX_HEADER_BYTES, edge_protocol
from gptq_api.edge.transport import SLICE
from gptq_api.edge.turns import Turns

POST = b"POST /%d HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
TINY = b"1\r\nx\r\n" * (200 * 1024 // 6)
END = b"0\r\n\r\n"
SHOULD_END_S = 30


class Wire(asyncio.Transport):
    """What asyncio's transport would be."""

    def __init__(self) -> None:
        super().__init__({"socket": socket.socket()})
        self.sent = b""
        self.reading = True
        self.closing = False

    def write(self, data: Any) -> None:
        self.sent += data

    def write_eof(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    abort = close

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class Connection:
    """A protocol on a wire: the paths and bodies that the app got, the bytes that h11 got in each turn of the loop."""

    def __init__(self, reads_bodies: bool = True, turns: Turns | None = None) -> None:
        self.reads_bodies = reads_bodies
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.requests: list[tuple[str, int]] = []
        self.turn = 0
        self.parsed: dict[int, int] = {}
        config = uvicorn.Config(
            self.app,
            interface="asgi3",
            proxy_headers=False,
            ws="none",
            lifespan="off",
            log_config=None,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
        config.load()
        make: Any = edge_protocol(5, 5, lambda status, message: message.encode())
        self.protocol = make(config, ServerState(), {})
        if turns is not None:
            self.protocol.turns = turns
        self.wire = Wire()
        self.protocol.connection_made(self.wire)
        receive = self.protocol.conn.receive_data

        def noted(data: bytes) -> None:
            self.parsed[self.turn] = self.parsed.get(self.turn, 0) + len(data)
            receive(data)

        self.protocol.conn.receive_data = noted

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        size, more = 0, self.reads_bodies
        while more:
            await self.may_read.wait()
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size, more = size + len(message["body"]), message["more_body"]
        self.requests.append((scope["path"], size))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def turns_until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(SHOULD_END_S):
            while not done():
                self.turn += 1
                await asyncio.sleep(0)

    def close(self) -> None:
        self.wire.get_extra_info("socket").close()
        self.protocol.connection_lost(None)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def test_one_turn_parses_a_little_and_nothing_is_read_meanwhile() -> None:
    async def test() -> None:
        connection = Connection()
        data = POST % 1 + TINY + END + POST % 2 + TINY + END + b"GET /3 HTTP/1.1\r\nHost: x\r\n\r\n"
        connection.protocol.data_received(data)
        assert not connection.wire.reading
        await connection.turns_until(lambda: len(connection.requests) == 3)
        size = len(TINY) // 6
        assert connection.requests == [("/1", size), ("/2", size), ("/3", 0)]
        assert sum(connection.parsed.values()) == len(data)
        assert max(connection.parsed.values()) <= 8 * 1024
        assert connection.wire.reading and not connection.wire.closing
        connection.close()

    run(test())


def test_a_body_that_is_not_consumed_is_not_parsed() -> None:
    async def test() -> None:
        connection = Connection()
        connection.may_read.clear()
        data = POST % 1 + b"%x\r\n" % 200_000 + b"x" * 200_000 + b"\r\n" + END
        connection.protocol.data_received(data)
        before = -1
        while before != (before := sum(connection.parsed.values())):
            until = connection.turn + 50
            await connection.turns_until(partial(lambda until: connection.turn >= until, until))
        assert before < 100_000 and not connection.wire.reading
        assert len(connection.protocol.cycle.body) < 100_000
        connection.may_read.set()
        await connection.turns_until(lambda: bool(connection.requests))
        assert connection.requests == [("/1", 200_000)] and connection.wire.reading
        connection.close()

    run(test())


def test_nothing_is_parsed_for_a_client_that_has_gone_or_was_answered() -> None:
    async def test() -> None:
        gone, answered = Connection(), Connection(reads_bodies=False)
        for connection in (gone, answered):
            connection.protocol.data_received(POST % 1 + TINY)
        gone.close()
        await answered.turns_until(lambda: bool(answered.requests))
        assert b"connection: close" in answered.wire.sent.lower() and not answered.wire.closing
        for _ in range(100):
            assert answered.wire.reading
            answered.protocol.data_received(END + POST % 2 + TINY)
            if answered.wire.closing:
                break
            await answered.turns_until(partial(lambda until: answered.turn >= until, answered.turn + 1))
        assert answered.wire.closing, "16 MiB are enough"
        for connection in (gone, answered):
            assert sum(connection.parsed.values()) <= 32 * 1024
        assert answered.requests == [("/1", 0)] and answered.wire.sent.count(b"HTTP/1.1") == 1
        assert answered.protocol.conn.our_state is h11.CLOSED
        answered.close()

    run(test())


def test_senders_of_costly_bodies_share_a_part_of_each_turn_and_a_new_request_does_not_wait_behind_them() -> None:
    async def test() -> None:
        first = Connection()
        others = [Connection(turns=first.protocol.turns) for _ in range(20)]
        for sender in others:
            sender.protocol.data_received(POST % 1 + TINY)

        def num_parsed() -> int:
            return sum(sum(sender.parsed.values()) for sender in others)

        before = num_parsed()
        await first.turns_until(lambda: first.turn == 10)
        assert 0 < num_parsed() - before < 10 * 10 * SLICE, "fewer than half of them in each turn"
        first.protocol.data_received(b"GET /3 HTTP/1.1\r\nHost: x\r\n\r\n")
        await first.turns_until(lambda: bool(first.requests))
        assert first.turn <= 15
        for connection in (first, *others):
            connection.close()

    run(test())
