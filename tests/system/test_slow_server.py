"""A server that gets no processor for a while: its clients had their time, and are not told that they were slow."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import Server, raw_request, wait_for

TIMEOUT_S, STOPPED_S = 4, 6
SOON_S = 0.4
"""after which it has read what it was sent"""


def tokenize(text: str) -> bytes:
    return raw_request("/tokenize", json.dumps({"prompt": text}).encode(), "Connection: close")


REQUEST, LONG = tokenize("word " * 40), tokenize("word " * 20_000)
LARGE = tokenize("a" * 12 * 2**20)
"""more than sockets hold"""
HEAD = REQUEST.index(b"\r\n\r\n") + 4
CUTS = {"nothing": 0, "half a head": HEAD // 2, "the head": HEAD, "half a body": (HEAD + len(REQUEST)) // 2}


@pytest.fixture(scope="module")
def hasty_server() -> Iterator[Server]:
    seconds = str(TIMEOUT_S)
    flags = ("--header-timeout-s", seconds, "--body-timeout-s", seconds, "--max-body-bytes", str(16 * 2**20))
    with Server(*flags) as running:
        yield running


@contextlib.contextmanager
def connections(server: Server, *begun: bytes) -> Iterator[list[socket.socket]]:
    """One for each of what they have sent."""
    with contextlib.ExitStack() as stack:
        opened = []
        for data in begun:
            sock = stack.enter_context(contextlib.closing(socket.create_connection(("127.0.0.1", server.port))))
            sock.settimeout(30)
            sock.sendall(data)
            opened.append(sock)
        time.sleep(SOON_S)
        yield opened


@contextlib.contextmanager
def stopped(server: Server) -> Iterator[None]:
    """Around what happens while it has no processor, for longer than clients have time."""
    state = Path(f"/proc/{server.process.pid}/stat")
    server.signal(signal.SIGSTOP)
    try:
        wait_for(lambda: state.read_text().rsplit(")", 1)[1].split()[0] == "T", 10)
        yield
        time.sleep(STOPPED_S)
    finally:
        server.signal(signal.SIGCONT)


def status_of(sock: socket.socket) -> int:
    """Of the answer, which is read to its end or the connection's."""
    data = b""
    while part := sock.recv(2**16):
        data += part
    match = re.match(rb"HTTP/1\.1 (\d+) ", data)
    assert match is not None, data
    return int(match[1])


def test_what_came_while_it_was_stopped_is_read(hasty_server: Server) -> None:
    """The last client could not send everything before the server read again."""
    begun = [REQUEST[:cut] for cut in CUTS.values()]
    with connections(hasty_server, *begun, LARGE[:1024]) as (*socks, large):
        sending = threading.Thread(target=large.sendall, args=(LARGE[1024:],))
        with stopped(hasty_server):
            sending.start()
            for sock, data in zip(socks, begun, strict=True):
                sock.sendall(REQUEST[len(data) :])
        told = {name: status_of(sock) for name, sock in zip(CUTS, socks, strict=True)}
        assert told == dict.fromkeys(CUTS, 200)
        assert status_of(large) != 408
        sending.join()


def test_who_drips_or_sends_nothing_more_is_still_refused(hasty_server: Server) -> None:
    """Also one that has always sent something when its time is over."""
    head, _, body = LONG.partition(b"\r\n\r\n")
    dripping_head, dripping_body = head + b"\r\nX-Long: ", head + b"\r\n\r\n" + body[:1000]
    with connections(hasty_server, dripping_head, dripping_body, REQUEST[: HEAD + 5]) as socks:
        with stopped(hasty_server):
            for sock in socks[:2]:
                sock.sendall(b"a")
        for sock in socks[:2]:
            sock.settimeout(0.005)
        told, until = dict.fromkeys(socks[:2], b""), time.monotonic() + 30
        while not all(b"\r\n\r\n" in data for data in told.values()):
            assert time.monotonic() < until, told
            for sock in told:
                with contextlib.suppress(TimeoutError):
                    told[sock] += sock.recv(4096)
                with contextlib.suppress(OSError):
                    sock.send(b"a")
        assert all(data.startswith(b"HTTP/1.1 408 ") for data in told.values()), told
        assert status_of(socks[2]) == 408
