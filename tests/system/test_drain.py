"""Who would hold up a server that is told to stop: clients that do not finish what they send, or do not read."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import pytest

from tests.support.heavy_bodies import CHAT, answer, connect
from tests.support.server import RawStream, Server, chat_body, raw_request, wait_for


def test_unfinished_bodies_are_cut_at_once() -> None:
    with Server() as server:
        socks: list[socket.socket] = []
        for body in (b"{" * 10, b" " * 100_000):
            for extra in ([], ["Transfer-Encoding: chunked"]):
                data = raw_request(CHAT, body, *extra)
                if extra:
                    data = data.replace(b"Content-Length", b"X-Length").replace(body, b"%x\r\n%s" % (len(body), body))
                socks.append(connect(server))
                socks[-1].sendall(data[:-1])
        socks.append(connect(server))
        socks[-1].sendall(b"POST /v1/chat")
        time.sleep(0.5)
        started = time.monotonic()
        server.signal(signal.SIGTERM)
        told = [answer(sock) for sock in socks]
        assert server.wait() == 0
        assert time.monotonic() - started < 5
        for found in told[:-1]:
            assert found.startswith(b"HTTP/1.1 503 ") and b"server_shutting_down" in found and b"retry-after" in found
        assert "Traceback" not in server.log()


def test_a_body_that_comes_while_the_server_stops_is_not_read() -> None:
    with Server() as server:
        stream = RawStream(server, chat_body(ignore_eos=True, stream=True, max_tokens=900))
        stream.head()
        server.signal(signal.SIGTERM)
        wait_for(lambda: "shutting down" in server.log(), 10)
        sock = connect(server)
        sock.sendall(raw_request(CHAT, b" " * 1000)[:-500])
        assert b"server_shutting_down" in answer(sock)
        stream.close()
        assert server.wait() == 0


def test_a_reader_that_does_not_read_is_not_waited_for() -> None:
    """One that reads, however slowly, is."""
    wide = chat_body(ignore_eos=True, stream=True, logprobs=True, top_logprobs=20, max_tokens=600)
    with Server() as server:
        stuck, slow = (RawStream(server, wide, rcvbuf=4096) for _ in range(2))
        wait_for(lambda: server.metric("vllm:iteration_tokens_total_count") > 300, 30)
        data: list[bytes] = []

        def read() -> None:
            while part := slow.sock.recv(16384):
                data.append(part)
                time.sleep(0.05 if len(data) < 60 else 0)

        reader = threading.Thread(target=read)
        reader.start()
        server.signal(signal.SIGTERM)
        reader.join()
        read_at = time.monotonic()
        assert b"".join(data).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert server.wait(25) == 0
        assert time.monotonic() - read_at < 12
        for stream in (stuck, slow):
            stream.close()


@pytest.mark.alone
def test_a_server_that_leaves_is_not_ready_before_it_refuses_anything() -> None:
    with Server("--drain-delay-s", "3", "--drain-timeout-s", "5") as server:
        stream = RawStream(server, chat_body(ignore_eos=True, stream=True, max_tokens=900))
        stream.head()
        started = time.monotonic()
        server.signal(signal.SIGTERM)
        wait_for(lambda: server.http.get("/ready").status_code == 503, 2)
        assert server.http.get("/ready").json() == {"status": "shutting down"}
        assert server.http.get("/health").status_code == 200
        assert server.chat(max_tokens=2).status_code == 200, "it is not draining yet"
        assert time.monotonic() - started < 3
        wait_for(lambda: "in flight have 5 s" in server.log(), 10)
        assert list(stream.events())[-1] == b"data: [DONE]"
        assert server.wait() == 0 and time.monotonic() - started >= 3
        assert "leaving: not ready from now on" in server.log()


def test_a_second_signal_does_not_wait_for_routers() -> None:
    """Neither does an interrupt: test_life.py, test_at_the_deadline_the_rest_is_told."""
    with Server("--drain-delay-s", "60") as server:
        started = time.monotonic()
        for _ in range(2):
            server.signal(signal.SIGTERM)
            wait_for(lambda: server.process.poll() is not None or "ready from now" in server.log(), 10)
        assert server.wait() == 143
        assert time.monotonic() - started < 15


def test_an_engine_that_dies_while_the_server_leaves() -> None:
    with Server("--drain-delay-s", "60") as server:
        server.signal(signal.SIGTERM)
        wait_for(lambda: "ready from now" in server.log(), 10)
        os.kill(server.engine_pid, signal.SIGKILL)
        assert server.wait() == 70
