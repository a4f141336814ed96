"""Clients that leave or do not read, a full house, the end of a server and the end of its engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gptq_api.api.server import _stop_loading
from gptq_api.api.service import Service
from gptq_api.errors import UserError
from tests.support.commands import Commands
from tests.support.server import (
    RawStream,
    Server,
    alive,
    chat_body,
    check_error,
    chunks,
    raw_request,
    stream_chunks,
    wait_for,
)

CHAT = "/v1/chat/completions"

slow_engine = pytest.mark.usefixtures("slow_engine")
ENDLESS: dict[str, Any] = {"ignore_eos": True, "temperature": 0}


def running(server: Server) -> float:
    return server.metric("vllm:num_requests_running", "vllm:num_requests_waiting")


def reset(sock: socket.socket) -> None:
    """Close with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("when", ["at once", "before the first token", "in the middle"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_forgotten(server: Server, stream: bool, when: str, how: str) -> None:
    server.wait_idle()
    cancelled = server.metric("gptq_api:requests_cancelled_total", cause="disconnect")
    raw = RawStream(server, chat_body("Tell me a story.", stream=stream, n=2, **ENDLESS))
    if when != "at once":
        wait_for(lambda: running(server) == 2, 5)
    if when == "in the middle":
        if stream:
            raw.head()
            events = raw.events()
            for _ in range(4):
                next(events)
        else:
            time.sleep(0.1)
    raw.close() if how == "fin" else reset(raw.sock)
    wait_for(lambda: server.metric("gptq_api:requests_cancelled_total", cause="disconnect") == cancelled + 1, 3)
    assert running(server) == 0
    steps = server.metric("vllm:iteration_tokens_total_count")
    time.sleep(0.15)
    assert server.metric("vllm:iteration_tokens_total_count") - steps <= 2, "the engine went on for nobody"
    assert "Traceback" not in server.log()


def test_leaving_while_uploading(server: Server) -> None:
    whole = raw_request("/v1/chat/completions", json.dumps(chat_body("x" * 5000)).encode())
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(whole[:-100])
        time.sleep(0.05)
    assert server.chat(max_tokens=1).status_code == 200
    wait_for(lambda: "status=499" in server.log(), 3)
    assert "Traceback" not in server.log()


def test_a_reader_that_never_reads_is_cut_and_slows_nobody(strict_server: Server) -> None:
    server = strict_server
    # many bytes per token, so that a small model fills the buffers
    wide = {"logprobs": True, "top_logprobs": 20, "n": 2, "stream": True, **ENDLESS}
    before = server.metric("gptq_api:requests_cancelled_total", cause="slow_reader")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", server.port))
    body = json.dumps(chat_body("Tell me a story.", **wide)).encode()
    sock.sendall(raw_request("/v1/chat/completions", body, "Authorization: Bearer first-key"))
    assert server.chat(max_tokens=8, **ENDLESS).status_code == 200
    wait_for(
        lambda: server.metric("gptq_api:requests_cancelled_total", cause="slow_reader") == before + 1,
        30,
    )
    assert running(server) == 0
    sock.close()
    assert '"outcome": "slow_reader"' in server.log()
    assert "Traceback" not in server.log()


def check_full(refused: httpx.Response, code: str) -> None:
    check_error(refused, 429, None, code)
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert 0 <= int(refused.headers["retry-after"]) * 1000 - int(refused.headers["retry-after-ms"]) < 1000


def test_a_full_house_answers_429_before_any_header_of_a_stream(strict_server: Server) -> None:
    server = strict_server
    server.wait_idle()
    slow = chat_body("Tell me a story.", n=3, stream=True, **ENDLESS)
    last = chat_body("Tell me a story.", stream=True, **ENDLESS)
    second = {"authorization": "Bearer second-key"}
    with server.http.stream("POST", CHAT, json=slow) as occupied:
        assert occupied.status_code == 200
        wait_for(lambda: running(server) == 3, 5)
        check_full(server.chat(stream=True), "share_full")
        with server.http.stream("POST", CHAT, json=last, headers=second) as other:
            assert other.status_code == 200, "the last place is kept for another key"
            wait_for(lambda: running(server) == 4, 5)
            for headers in ({}, second):
                check_full(server.post(CHAT, chat_body(stream=True), **headers), "server_full")
            wait_for(lambda: server.metric("vllm:num_requests_waiting") == 2, 2)
            running_now = next(line for line in other.iter_lines() if "content" in line)
            assert running_now, "a seat, though the first key has more than there are"
    server.wait_idle()
    assert server.chat(max_tokens=1).status_code == 200
    assert server.metric("vllm:admission_rejections_total", reason="server_full") >= 1


def test_all_choices_are_admitted_or_none(strict_server: Server) -> None:
    server = strict_server
    server.wait_idle()
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(n=2, stream=True, **ENDLESS)):
        wait_for(lambda: running(server) == 2, 5)
        assert server.chat(n=3).status_code == 429
        assert running(server) == 2
    assert server.chat(n=5).status_code == 400, "can never be admitted"
    server.wait_idle()


def test_many_clients_at_once() -> None:
    """What everyone gets does not depend on who else is there: exactly, where the model computes in float32."""
    count = chat_body("Count from one to ten.", max_tokens=16, **ENDLESS)
    stories = [
        chat_body(f"Story {seed}", max_tokens=24, seed=seed, n=1 + seed % 3, ignore_eos=True) for seed in range(8)
    ]
    bodies = [body for story in stories for body in (count, story)]
    with Server("--dtype", "float32") as server:

        def choices(body: dict[str, Any]) -> Any:
            return server.post("/v1/chat/completions", body).json()["choices"]

        alone = [choices(body) for body in bodies]
        with ThreadPoolExecutor(len(bodies)) as clients:
            together = list(clients.map(choices, bodies))
    assert together == alone
    assert len({choice["message"]["content"] for answer in alone for choice in answer}) > 8


class Reader(threading.Thread):
    """Reads one stream to its end in the background."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        super().__init__()
        self.raw = RawStream(server, {**body, "stream": True})
        self.status, _ = self.raw.head()
        self.found: list[bytes] = []
        self.ended_at = 0.0
        self.start()

    def run(self) -> None:
        with contextlib.suppress(ConnectionError, OSError):
            self.found.extend(self.raw.events())
        self.ended_at = time.monotonic()
        self.raw.close()


@slow_engine
@pytest.mark.alone
def test_sigterm_lets_running_requests_finish() -> None:
    with Server("--log-json") as server:
        engine = server.engine_pid
        reader = Reader(server, chat_body(max_tokens=200, **ENDLESS))
        probe = httpx.Client(base_url=f"http://127.0.0.1:{server.port}")
        assert probe.get("/ready").status_code == 200
        wait_for(lambda: len(reader.found) > 3, 10)
        server.signal(signal.SIGTERM)
        deadline = time.monotonic() + 1
        while probe.get("/ready").status_code != 503:
            assert time.monotonic() < deadline
        assert reader.is_alive(), "the stream was too short for this test"
        assert probe.get("/health").status_code == 200
        refused = probe.post("/v1/chat/completions", json=chat_body())
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "server_shutting_down"
        assert int(refused.headers["retry-after"]) > 0
        probe.close()
        reader.join(30)
        found = chunks(reader.found)
        assert found[-1]["choices"][0]["finish_reason"] == "length"
        assert server.wait(5) == 0
        assert time.monotonic() - reader.ended_at < 1.5
        wait_for(lambda: not alive(engine), 3)
        assert all(json.loads(line) for line in server.log().splitlines()) and "Traceback" not in server.log()


@slow_engine
def test_at_the_deadline_the_rest_is_told() -> None:
    """An interrupt does not wait for routers before it."""
    with Server("--drain-timeout-s", "0.5", "--drain-delay-s", "60") as server:
        readers = [Reader(server, chat_body(**ENDLESS)) for _ in range(2)]
        waiting: list[httpx.Response] = []
        plain = threading.Thread(target=lambda: waiting.append(server.chat(**ENDLESS)))
        plain.start()
        wait_for(lambda: running(server) == 3, 10)
        started = time.monotonic()
        server.signal(signal.SIGINT)
        assert server.wait(10) == 0
        assert time.monotonic() - started < 4
        for reader in readers:
            reader.join(5)
            assert chunks(reader.found)[-1]["error"]["code"] == "server_shutting_down"
        plain.join(5)
        assert waiting[0].status_code == 503 and waiting[0].json()["error"]["code"] == "server_shutting_down"
        assert "Traceback" not in server.log()


@slow_engine
@pytest.mark.alone
def test_a_second_signal_ends_it_within_a_second() -> None:
    with Server() as server:
        engine = server.engine_pid
        reader = Reader(server, chat_body(**ENDLESS))
        wait_for(lambda: len(reader.found) > 1, 10)
        server.signal(signal.SIGINT)
        time.sleep(0.2)
        assert server.process.poll() is None
        started = time.monotonic()
        server.signal(signal.SIGINT)
        assert server.wait(5) == 130
        assert time.monotonic() - started < 2
        wait_for(lambda: not alive(engine), 3)
        reader.join(5)
        assert "Traceback" not in server.log()


@slow_engine
@pytest.mark.alone
def test_two_servers_and_the_death_of_one_engine(server: Server) -> None:
    """Every stream of it ends with an error event, /health says so, the process leaves with 70; the other goes on."""
    with Server() as other:
        assert other.port != server.port and other.engine_pid != server.engine_pid
        readers = [Reader(other, chat_body(f"Story {i}", **ENDLESS)) for i in range(4)]
        wait_for(lambda: running(other) == 4 and all(len(reader.found) > 2 for reader in readers), 10)
        started = time.monotonic()
        os.kill(other.engine_pid, signal.SIGKILL)
        for reader in readers:
            reader.join(5)
        assert max(reader.ended_at for reader in readers) - started < 2
        for reader in readers:
            assert chunks(reader.found)[-1]["error"]["code"] == "engine_dead"
        assert other.http.get("/health").status_code == 503
        refused = other.chat()
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert other.wait(5) == 70
        assert time.monotonic() - started < 5
        assert "Traceback" not in other.log()
        assert server.chat(max_tokens=1).status_code == 200


FAULTS = """
import sys
if "gptq_api.engine.process" in sys.orig_argv:
    from gptq_api.runner.cpu.runner import CpuRunner
    launch = CpuRunner.launch
    def faulty(self, step):
        launched, place = launch(self, step), 0
        for seat, num_tokens in zip(step.seats, launched.sampled.num_tokens):
            sequence = self._seats._seats[seat]
            if num_tokens and sequence.params.seed == 666 and sequence.num_output_tokens >= 6:
                launched.sampled.tokens[place] = -1
            if sequence.params.seed == 667 and sequence.num_output_tokens >= 6:
                raise RuntimeError("injected")
            place += num_tokens
        return launched
    CpuRunner.launch = faulty
"""


@slow_engine
def test_faults_inside_the_engine(tmp_path: Path) -> None:
    """Numbers that are not finite end one sequence, an exception in a step ends the server; nobody is left waiting."""
    (tmp_path / "sitecustomize.py").write_text(FAULTS)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    with Server(env={"PYTHONPATH": path}) as server:
        neighbour = Reader(server, chat_body(**ENDLESS))
        broken = server.chat(seed=666, ignore_eos=True)
        assert broken.status_code == 500 and broken.json()["error"]["code"] == "generation_failed"
        assert broken.headers["x-should-retry"] == "false"
        streamed = stream_chunks(server, chat_body(seed=666, ignore_eos=True))
        assert streamed[-1]["error"]["code"] == "generation_failed" and len(streamed) >= 3
        assert neighbour.is_alive() and server.http.get("/health").status_code == 200
        assert server.metric("vllm:request_success_total", finished_reason="error") == 2
        other = Reader(server, chat_body("Another story", **ENDLESS))
        last = stream_chunks(server, chat_body(seed=667, ignore_eos=True))
        assert last[-1]["error"]["code"] == "engine_dead"
        other.join(5)
        assert chunks(other.found)[-1]["error"]["code"] == "engine_dead"
        neighbour.join(5)
        assert server.wait(5) == 70


@slow_engine
def test_kill_9_of_the_server_takes_the_engine_with_it() -> None:
    with Server() as server:
        engine = server.engine_pid
        reader = Reader(server, chat_body(**ENDLESS))
        wait_for(lambda: len(reader.found) > 1, 10)
        server.process.kill()
        server.wait(5)
        wait_for(lambda: not alive(engine), 3)
        reader.join(5)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", server.port))


def test_a_port_in_use_is_one_sentence(server: Server, commands: Commands) -> None:
    done = commands.run("serve", "--port", str(server.port))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        f"gptq-api serve: port {server.port} on 127.0.0.1 is in use: stop what runs there or choose another --port"
    ], "found out before anything is loaded"


def test_a_start_that_fails_is_one_sentence(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for flags in (("--model-path", str(tmp_path / "none")), ("--model-path", str(tmp_path / "empty"))):
        done = commands.run("serve", "--port", "0", *flags)
        assert done.returncode == 1
        sentences = [line for line in done.stderr.splitlines() if line.startswith("gptq-api serve: ")]
        assert len(sentences) == 1 and str(tmp_path) in sentences[0]
        assert not any(word in done.stderr for word in ("Traceback", "never retrieved", "serving"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_while_loading_ends_it(number: int, status: int) -> None:
    """As a terminal sends it: to every process of the group."""
    with Server("--log-json", wait=False) as server:
        wait_for(lambda: "loading" in server.log(), 10)
        children = server.children()
        os.killpg(server.process.pid, number)
        assert server.wait(5) == status
        lines = [json.loads(line) for line in server.log().splitlines()]
        assert [line["event"] for line in lines] == ["loading demo", "stopped while loading"]
        assert lines[-1]["exit_status"] == status
        wait_for(lambda: not any(map(alive, children)), 3)


INTERRUPTED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == NAME and "serve" in sys.orig_argv:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("module", "line"), [("pydantic", "gptq-api: stopped"), ("starlette", "gptq-api serve: stopped")]
)
def test_an_interrupt_while_modules_are_imported_is_one_line(module: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED.replace("NAME", repr(module)))
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    with Server(env={"PYTHONPATH": path}, wait=False) as server:
        assert server.wait(15) == 130
        assert server.log().splitlines() == [line]


async def test_an_error_that_comes_while_loading_is_stopped_keeps_its_sentence() -> None:
    async def load() -> Service:
        try:
            await asyncio.sleep(60)
        finally:
            raise UserError("the weights are damaged")

    loading = asyncio.ensure_future(load())
    await asyncio.sleep(0)
    signals = SimpleNamespace(last=signal.SIGTERM)
    with pytest.raises(UserError, match="the weights are damaged"):
        await _stop_loading(loading, signals)  # type: ignore[arg-type]
