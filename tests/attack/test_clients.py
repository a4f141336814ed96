"""Clients that leave, do not read, hardly send or vanish, and many that wait: whoever behaves is served, and at the end
nothing is held."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import random
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.attack.clients import (
    CHAT,
    Stopped,
    chat_request,
    check_free,
    connections,
    hang_ups,
    num_descriptors,
    num_threads,
    resident_bytes,
    text_of_stream,
)
from tests.support.server import Server, chat_body, raw_request, wait_for

slow_engine = pytest.mark.usefixtures("slow_engine")
ENDLESS: dict[str, Any] = {"ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def impatient() -> Iterator[Server]:
    """A server with short time limits."""
    limits = ("--header-timeout-s", "1", "--body-timeout-s", "3", "--send-timeout-s", "1")
    with Server(*limits, "--max-body-bytes", str(8 * 2**20)) as running:
        yield running


def check_hang_ups(count: int) -> None:
    with Server("--max-num-seqs", "16", "--body-timeout-s", "2") as server:
        expected = server.chat("Count.", max_tokens=16, **ENDLESS).json()["choices"]
        server.chat(max_tokens=4, response_format={"type": "json_object"})  # every child process has begun
        held = num_descriptors(server.process.pid)
        asyncio.run(hang_ups(server.port, count, random.Random(count)))
        check_free(server, 30)
        wait_for(lambda: num_descriptors(server.process.pid) <= held, 10)
        assert server.chat("Count.", max_tokens=16, **ENDLESS).json()["choices"] == expected
        assert server.metric("gptq_api:requests_cancelled_total", cause="disconnect") > count / 4
        assert num_threads(server.process.pid) < 40
        assert "Traceback" not in server.log()


def test_a_hundred_hang_ups() -> None:
    check_hang_ups(100)


@slow_engine
@pytest.mark.attack
@pytest.mark.timeout(600)
def test_a_thousand_hang_ups() -> None:
    check_hang_ups(1000)


def test_who_does_not_read_or_hardly_sends_is_cut_while_others_are_served(impatient: Server) -> None:
    """Of each kind ten: streams that nobody reads, silence, half a head, a head a byte at a time, half a body."""
    half = chat_request(chat_body("x" * 2000))
    wide = chat_body("Tell me a story.", logprobs=True, top_logprobs=20, stream=True, n=2, **ENDLESS)
    server = impatient
    with contextlib.ExitStack() as stack:
        server.chat(max_tokens=1)
        cut = server.metric("gptq_api:requests_cancelled_total", cause="slow_reader")
        held = num_descriptors(server.process.pid)
        stack.enter_context(Stopped(server, 10, wide))
        for begin in (b"", half[:30], half[:-100]):
            stack.enter_context(connections(server.port, 10, begin))
        dripping = stack.enter_context(connections(server.port, 10, b"GET /health HTTP/1.1\r\nX: "))
        assert server.chat("Hello", max_tokens=8, **ENDLESS).status_code == 200
        for _ in range(30):
            for sock in dripping:
                with contextlib.suppress(OSError):
                    sock.sendall(b"a")
            time.sleep(0.05)
        wait_for(lambda: server.metric("gptq_api:requests_cancelled_total", cause="slow_reader") == cut + 10, 60)
        wait_for(lambda: num_descriptors(server.process.pid) <= held, 10)
        check_free(server)
        assert server.chat("Hello", max_tokens=8).status_code == 200
        assert "Traceback" not in server.log()


def check_held_streams(num_running: int, num_waiting: int, max_tokens: int) -> None:
    """What each of many streams gets is what it gets alone, exactly, where the model computes in float32."""
    num = num_running + num_waiting
    bodies = [
        chat_body(f"Tell me about {i}.", max_tokens=max_tokens, seed=i, temperature=2, ignore_eos=True)
        for i in range(num)
    ]
    flags = ("--dtype", "float32", "--max-num-seqs", str(num_running), "--max-queued-requests", str(2 * num))
    with Server(*flags) as server:

        async def together() -> list[str]:
            return await asyncio.gather(*(text_of_stream(server.port, body) for body in bodies))

        texts = asyncio.run(together())
        assert len(set(texts)) > num / 4
        check_free(server)
        assert server.metric("vllm:request_success_total", finished_reason="length") == num
        with ThreadPoolExecutor(1) as alone:
            expected = [
                answer.json()["choices"][0]["message"]["content"]
                for answer in alone.map(lambda body: server.post(CHAT, body), bodies)
            ]
        assert texts == expected


def test_four_streams_and_twenty_that_wait_answer_as_alone() -> None:
    check_held_streams(4, 20, 8)


@pytest.mark.attack
@pytest.mark.timeout(1200)
def test_64_streams_and_448_that_wait_answer_as_alone() -> None:
    check_held_streams(64, 448, 8)


@slow_engine
@pytest.mark.attack
def test_a_peer_that_vanished_is_forgotten() -> None:
    """Every packet to the client is dropped before its kernel sees it, as if its cable had been cut: no FIN, no RST, no
    acknowledgement. The server's kernel gives up after TCP_USER_TIMEOUT, 30 s."""
    nothing = struct.pack("HBBI", 0x06, 0, 0, 0)  # BPF_RET | BPF_K: of each packet keep 0 bytes
    buffer = ctypes.create_string_buffer(nothing)
    program = struct.pack("HL", 1, ctypes.addressof(buffer))
    with Server("--send-timeout-s", "1000") as server:
        held = num_descriptors(server.process.pid)
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(chat_request(chat_body("Tell me a story.", stream=True, max_tokens=900, **ENDLESS)))
            assert b" 200 " in sock.recv(4096)
            try:
                sock.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER
            except OSError as error:
                pytest.skip(f"no filter can be attached here: {error}")
            wait_for(lambda: num_descriptors(server.process.pid) <= held, 50)
        check_free(server)
        assert "Traceback" not in server.log()


LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
"""


def status_of_new_connection(server: Server) -> int:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(raw_request("/health", b"", method="GET"))
        return int(sock.recv(4096).split()[1])


def test_out_of_descriptors(sitecustomize: Any) -> None:
    """Nearly all are taken by connections that do nothing: who is connected is served, the log stays short, and all is
    well when they leave."""
    with Server(env=sitecustomize(LIMIT)) as server:
        assert server.http.get("/health").status_code == 200  # its connection is kept
        with connections(server.port, 400):
            for _ in range(20):
                assert server.http.get("/health").status_code == 200
                time.sleep(0.05)
            assert server.chat(max_tokens=4).status_code == 200
        size = len(server.log())
        assert size < 20_000, f"{size} bytes of log: ...{server.log()[-500:]}"
        wait_for(lambda: status_of_new_connection(server) == 200, 10)
        assert server.chat(max_tokens=4).status_code == 200
        check_free(server)


def test_a_hundred_bodies_that_do_not_end_hold_little(impatient: Server) -> None:
    """8 MB are announced by each and nearly sent; what all of them hold together is bounded."""
    body = json.dumps(chat_body("x" * 7_000_000)).encode()
    head = raw_request(CHAT, body).removesuffix(body)
    server = impatient
    before = resident_bytes(server.process.pid)
    with connections(server.port, 100, head) as socks, ThreadPoolExecutor(100) as senders:

        def send(sock: socket.socket) -> None:
            with contextlib.suppress(OSError):
                sock.settimeout(2)
                sock.sendall(body[:-100])

        done = [senders.submit(send, sock) for sock in socks]
        most = 0
        while not all(future.done() for future in done):
            most = max(most, resident_bytes(server.process.pid) - before)
            assert server.http.get("/health").status_code == 200
            time.sleep(0.05)
    assert most < 96 * 2**20, f"{most / 2**20:.0f} MiB"
    assert server.chat(max_tokens=4).status_code == 200
    check_free(server)
