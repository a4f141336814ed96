"""A server whose KV events are read: who reads them knows beforehand how much of a prompt is cached."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.kv_reader import Index
from tests.support.server import Server, wait_for


@pytest.fixture
def socket() -> Iterator[Any]:
    """A subscriber that is connected to nothing yet."""
    zmq = pytest.importorskip("zmq", reason="pyzmq is not installed: pip install 'gptq-api[events]'")
    context = zmq.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.setsockopt(zmq.RECONNECT_IVL, 5)  # ms; by default it looks for a new server ten times a second
    yield subscriber
    context.destroy(linger=0)


def take_all(socket: Any, index: Index) -> None:
    while socket.poll(0):
        _, number, payload = socket.recv_multipart()
        index.take(number, payload)


def tokenized(server: Server, content: str) -> list[int]:
    body = {"messages": [{"role": "user", "content": content}], "add_generation_prompt": True}
    tokens: list[int] = server.post("/tokenize", body).json()["tokens"]
    return tokens


def settled(server: Server, socket: Any, index: Index) -> None:
    """All events of requests that have ended are read, since those of another one are, which is like none before."""
    content = secrets.token_hex(4)
    prompt = tokenized(server, content)
    server.chat(content, max_tokens=1)

    def read() -> bool:
        socket.poll(20)
        take_all(socket, index)
        return index.block_size > 0 and index.num_cached(prompt) + index.block_size > len(prompt) - 1

    wait_for(read, 20)


def test_a_router_knows_what_a_server_has_cached(tmp_path: Path, socket: Any) -> None:
    events, index = f"ipc://{tmp_path}/events", Index()
    socket.subscribe("kv@1.2.3.4:8000@demo")
    socket.connect(events)  # before the server is there, so that nothing is missed
    flags = ("--kv-events", events, "--kv-events-topic", "kv@1.2.3.4:8000@demo", "--block-size", "4")
    with Server(*flags, "--num-blocks", "80", "--restart-engine", "1") as server:
        hits = 0
        for i in range(24):
            content = f"{'What is GPTQ and how does it work? ' * (1 + i % 3)}{'abcd'[i % 4]}"
            prompt = tokenized(server, content)
            settled(server, socket, index)
            known = index.num_cached(prompt)
            usage = server.chat(content, max_tokens=4, temperature=0).json()["usage"]
            assert usage["prompt_tokens"] == len(prompt)
            assert usage["prompt_tokens_details"]["cached_tokens"] == known
            hits += known
        assert hits and index.next_number > 24 + 12
        assert server.metric("gptq_api:kv_events_dropped_total") == 0

        settled(server, socket, index)
        assert index.blocks
        index.next_number = 0  # an engine that is new counts from 0, and has nothing cached
        os.kill(server.engine_pid, signal.SIGKILL)
        wait_for(lambda: socket.poll(20), 60)
        take_all(socket, index)
        assert index.next_number == 1 and not index.blocks
        wait_for(lambda: server.http.get("/ready").status_code == 200, 60)
        content = "What is GPTQ and how does it work?"
        server.chat(content, max_tokens=4)
        settled(server, socket, index)
        assert index.num_cached(tokenized(server, content))
        server.signal()
        assert server.wait() == 0
        wait_for(lambda: socket.poll(20), 10)
        take_all(socket, index)
        assert not index.blocks, "it is gone, and its cache with it"


def test_without_pyzmq_it_is_said_before_the_port_opens(tmp_path: Path) -> None:
    (tmp_path / "zmq.py").write_text("raise ImportError\n")
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    server = Server("--kv-events", "tcp://127.0.0.1:5557", wait=False, env={"PYTHONPATH": path})
    try:
        assert server.wait(60) == 1
        assert "--kv-events needs pyzmq, which is not installed: pip install 'gptq-api[events]'" in server.log()
        assert "Traceback" not in server.log() and "serving" not in server.log()
    finally:
        server.close()
