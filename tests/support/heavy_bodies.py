"""Clients that send large, costly or unfinished bodies over bare sockets, and what a server is like meanwhile."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.support.server import Server, raw_request

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGE = {"role": "user", "content": "Hello"}


def heavy_requests() -> dict[str, bytes]:
    """What has once stopped the event loop, and what is as heavy as the limits allow."""
    keys = {f"k{index}": 1 for index in range(800_000)}
    few = dict(list(keys.items())[:60_000])
    empty = "[" + "[]," * 2_700_000 + "[]]"
    bodies = {
        "8 MB of text": (CHAT, json.dumps({"messages": [{**MESSAGE, "content": "a b " * 2_000_000}]})),
        "800,000 keys": (CHAT, json.dumps({"messages": [MESSAGE], "max_tokens": 1, **keys})),
        "2.7 million arrays": (CHAT, f'{{"messages":{empty}}}'),
        "a million ids": (COMPLETIONS, json.dumps({"prompt": list(range(10**6))})),
        "60,000 keys": (CHAT, json.dumps({"messages": [MESSAGE], "max_tokens": 1, **few})),
        "250,000 ids": (COMPLETIONS, json.dumps({"prompt": [7] * 250_000})),
        "4,096 messages": (CHAT, json.dumps({"messages": [MESSAGE] * 4096})),
        "2 MB of prediction": (
            CHAT,
            json.dumps(
                {
                    "messages": [MESSAGE],
                    "max_tokens": 1,
                    "prediction": {"type": "content", "content": "a b " * 510_000},
                }
            ),
        ),
        "2 MB of text": (CHAT, json.dumps({"messages": [{**MESSAGE, "content": "a b " * 510_000}]})),
    }
    return {name: raw_request(path, body.encode(), "Connection: close") for name, (path, body) in bodies.items()}


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), 60)


def answer(sock: socket.socket) -> bytes:
    """All that comes until the end of the connection, or until it is reset."""
    data = b""
    with sock, suppress(OSError):
        while part := sock.recv(65536):
            data += part
    return data


@contextmanager
def senders(server: Server, request: bytes, num: int) -> Iterator[None]:
    """So many clients, each of which sends the request again and again, on a connection of its own each time."""
    left = threading.Event()

    def send() -> None:
        while not left.is_set():
            sock = connect(server)
            with suppress(OSError):
                sock.sendall(request)
            answer(sock)

    threads = [threading.Thread(target=send) for _ in range(num)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        left.set()
        for thread in threads:
            thread.join()


def health_seconds(server: Server, num: int, most_s: float) -> list[float]:
    """Of each of so many requests to /health, or of fewer where those take longer than `most_s` together."""
    request, seconds, started = raw_request("/health", b"", method="GET"), list[float](), time.monotonic()
    with connect(server) as sock:
        while len(seconds) < num and time.monotonic() - started < most_s:
            begun = time.monotonic()
            sock.sendall(request)
            data = b""
            while b"}" not in data:
                data += sock.recv(4096)
            seconds.append(time.monotonic() - begun)
            assert data.startswith(b"HTTP/1.1 200 ")
            time.sleep(0.002)
    return seconds


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@contextmanager
def unfinished_bodies(server: Server, num: int, size: int, *, chunked: bool = False) -> Iterator[list[socket.socket]]:
    """So many clients that have sent so many bytes each, all but the last of the body; those that were refused are
    closed."""
    request = raw_request(CHAT, b" " * size)
    if chunked:
        head = request.partition(b"Content-Length")[0]
        request = head + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n" % size + b" " * size
    with ExitStack() as stack:
        socks = [stack.enter_context(connect(server)) for _ in range(num)]

        def send(sock: socket.socket) -> None:
            with suppress(OSError):
                sock.sendall(request[:-1])

        threads = [threading.Thread(target=send, args=(sock,)) for sock in socks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        yield socks
