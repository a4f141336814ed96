"""Clients that leave, do not read or hardly send, many at a time; and what a process holds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from tests.support.server import Server, raw_request, wait_for

CHAT = "/v1/chat/completions"


def check_free(server: Server, seconds: float = 10) -> None:
    """Nobody is served and nothing is held."""
    wait_for(lambda: server.metric("vllm:num_requests_running", "vllm:num_requests_waiting") == 0, seconds)
    wait_for(lambda: server.metric("vllm:kv_cache_usage_perc") == 0, seconds)


def num_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def num_threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def chat_request(body: dict[str, Any], *headers: str) -> bytes:
    return raw_request(CHAT, json.dumps(body).encode(), *headers)


def reset(sock: socket.socket) -> None:
    """Close with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def hang_up(port: int, rng: random.Random) -> None:
    """Ask for a long answer and leave at some moment, in some way."""
    body = {
        "messages": [{"role": "user", "content": f"Story {rng.randrange(50)} " + "word " * rng.randrange(100)}],
        "stream": rng.random() < 0.7,
        "n": rng.choice((1, 1, 2, 5)),
        "ignore_eos": True,
    }
    if rng.random() < 0.1:
        body |= {"response_format": {"type": "json_object"}, "ignore_eos": False}
    request = chat_request(body)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request[: rng.choice((len(request), len(request), len(request), rng.randrange(len(request))))])
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(rng.choice((0, 0.001, 0.01, 0.05, 0.2, 0.5))):
                for _ in range(rng.choice((1, 3, 20))):
                    await reader.read(300)
        sock = writer.get_extra_info("socket")
        if rng.random() < 0.5:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif rng.random() < 0.3 and body["stream"]:
            writer.write(request)  # a next one, which nobody waits for either; behind a whole answer it would hide us
    finally:
        writer.close()


async def hang_ups(port: int, count: int, rng: random.Random, at_a_time: int = 16) -> None:
    slots = asyncio.Semaphore(at_a_time)

    async def one() -> None:
        async with slots:
            await hang_up(port, rng)

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())


class Stopped:
    """Clients that asked for a stream and never read it."""

    def __init__(self, server: Server, count: int, body: dict[str, Any]) -> None:
        self.socks: list[socket.socket] = []
        for _ in range(count):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(chat_request(body))
            self.socks.append(sock)

    def __enter__(self) -> Stopped:
        return self

    def __exit__(self, *error: object) -> None:
        for sock in self.socks:
            sock.close()


@contextlib.contextmanager
def connections(port: int, count: int, begin: bytes = b"") -> Iterator[list[socket.socket]]:
    """So many, each of which has sent `begin`; fewer where no more are accepted."""
    socks: list[socket.socket] = []
    try:
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", port), timeout=10)
            socks.append(sock)
            with contextlib.suppress(OSError):
                sock.sendall(begin)
        yield socks
    finally:
        for sock in socks:
            sock.close()


async def text_of_stream(port: int, body: dict[str, Any]) -> str:
    """The text of one streamed chat, to its end. Raises ConnectionError where there is none."""
    text, ended = "", False
    async for event in events(port, body):
        if event == "[DONE]":
            ended = True
            continue
        chunk = json.loads(event)
        if "choices" not in chunk:
            raise ConnectionError(event)
        text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    if not ended:
        raise ConnectionError(f"no end after {text!r}")
    return text


async def events(port: int, body: dict[str, Any]) -> AsyncIterator[str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        writer.write(chat_request({**body, "stream": True}, "Connection: close"))
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head:
            raise ConnectionError((head + await reader.read()).decode())
        while size := int(await reader.readline(), 16):
            for event in (await reader.readexactly(size + 2)).decode().strip().split("\n\n"):
                if event.startswith("data: "):
                    yield event.removeprefix("data: ")
    finally:
        writer.close()
