"""An HTTP/1.1 client that sends any bytes as a request and reads whatever comes back, many connections at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

PATIENCE_S = 60.0
"""for one answer, on a machine that does other things as well"""


@dataclass(slots=True, frozen=True)
class Request:
    """A request whose framing is right; everything else may be wrong."""

    path: str
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)
    method: str = "POST"

    def encoded(self, *extra: str) -> bytes:
        lines = [f"{self.method} {self.path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(self.body)}"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        return "\r\n".join([*lines, *extra, "", ""]).encode("latin-1") + self.body


@dataclass(slots=True)
class Reply:
    request: Request
    status: int
    """0: no answer came, or half of one"""
    headers: dict[str, str]
    body: bytes
    why: str = ""
    """that no answer came"""


class Connection:
    """Kept alive for as long as the server does; opened again where it was closed."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: Request) -> Reply:
        """One request and its answer. A kept connection that the server closed at this moment is opened again."""
        for _ in range(2):
            kept = self._streams is not None
            try:
                async with asyncio.timeout(PATIENCE_S):
                    return await self._ask(request)
            except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
                self.close()
                why = f"{type(error).__name__}: {error}"
                if not kept:
                    break
            except TimeoutError:
                self.close()
                why = f"nothing for {PATIENCE_S:g} s"
                break
        return Reply(request, 0, {}, b"", why)

    async def _ask(self, request: Request) -> Reply:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)
        reader, writer = self._streams
        writer.write(request.encoded())
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = b""
        if "transfer-encoding" in headers:
            while size := int(await reader.readline(), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        elif request.method != "HEAD":
            body = await reader.readexactly(int(headers.get("content-length", "0")))
        if headers.get("connection", "").lower() == "close":
            self.close()
        return Reply(request, int(first.split()[1]), headers, body)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def ask_all(port: int, requests: Iterable[Request], num_connections: int = 8) -> list[Reply]:
    """The answers, in the order in which they came; so many are waited for at a time."""
    waiting, replies = iter(requests), list[Reply]()

    async def work() -> None:
        connection = Connection(port)
        for request in waiting:
            replies.append(await connection.ask(request))
        connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(num_connections):
            group.create_task(work())
    return replies
