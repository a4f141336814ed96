"""More connections than there are descriptors: the server keeps those it has, and its log stays short."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx

from tests.support.server import Server, raw_request, wait_for

HEALTH = raw_request("/health", b"", method="GET")


@contextmanager
def connections(server: Server, num: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10)) for _ in range(num)]


def first_line(sock: socket.socket) -> bytes:
    data = b""
    with suppress(OSError):
        sock.sendall(HEALTH)
        while b"}" not in data and (part := sock.recv(4096)):
            data += part
    return data.partition(b"\r\n")[0]


def test_connections_beyond_the_limit_of_open_files_are_turned_away() -> None:
    with Server(max_files=256) as server:
        assert server.http.get("/health").status_code == 200, "this connection is kept"
        with connections(server, 250) as socks:
            told = [first_line(sock) for sock in socks]
            num_served, num_told = told.count(b"HTTP/1.1 200 OK"), told.count(b"HTTP/1.1 503 Service Unavailable")
            assert 50 < num_served < 128 and 0 < num_told <= 40
            assert set(told) <= {b"HTTP/1.1 200 OK", b"HTTP/1.1 503 Service Unavailable", b""}
            assert {first_line(sock) for sock in socks[:num_served]} == {b"HTTP/1.1 200 OK"}
            assert server.http.get("/health").status_code == 200
            assert server.chat(max_tokens=2).status_code == 200
        wait_for(lambda: ask_anew(server), 10)
        log = server.log()
        assert 1 <= log.count("connections turned away") <= 4 and "ulimit -n" in log
        assert "Traceback" not in log and "OSError" not in log


def ask_anew(server: Server) -> bool:
    return httpx.get(f"http://127.0.0.1:{server.port}/health", trust_env=False).status_code == 200


def test_a_machine_without_descriptors_is_told_of_once_a_second() -> None:
    """As when other programs have them all: nothing is accepted for a while, without a busy loop."""
    with Server() as server:
        assert server.http.get("/health").status_code == 200
        pid = server.process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        length, before = len(server.log()), ticks(pid)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), hard))
        with connections(server, 100):
            time.sleep(2.2)
            assert server.http.get("/health").status_code == 200
            assert ticks(pid) - before < 100, "hundredths of a second, of 220"
            log = server.log()[length:]
            assert 1 <= log.count("no connection can be accepted") <= 4 and len(log) < 2000, log
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
            wait_for(lambda: ask_anew(server), 10)


def ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])
