"""`--restart-engine`: the server outlives its engine, tells everybody, leaks nothing, and knows when to give up."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Server, alive, chat_body, check_error, chunks, wait_for
from tests.system.test_life import Reader, running

pytestmark = pytest.mark.usefixtures("slow_engine")
ENDLESS: dict[str, Any] = chat_body("Tell me a story.", ignore_eos=True, temperature=0, stream=True)
COUNT: dict[str, Any] = chat_body("Count from one to ten.", max_tokens=16, ignore_eos=True, temperature=0)
DEATHS = 2
TOLD_S, READY_S = 2.0, 30.0
"""0.2 s and 6 s on an idle machine: `benchmarks/attack.py` measures them"""


def text(server: Server) -> Any:
    return server.post("/v1/chat/completions", COUNT).json()["choices"][0]["message"]


def probe(server: Server, path: str = "/health") -> tuple[int, str]:
    response = server.http.get(path)
    assert (response.status_code == 503) == ("retry-after" in response.headers)
    return response.status_code, response.json()["status"]


def wait_ready(server: Server) -> None:
    wait_for(lambda: probe(server, "/ready") == (200, "ready"), READY_S)


def kill_engine(server: Server) -> None:
    pid = server.engine_pid
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: probe(server)[0] == 503, 5)
    wait_for(lambda: not alive(pid), 5)


@pytest.mark.alone
def test_streams_are_told_and_the_engine_comes_back() -> None:
    with Server("--restart-engine", "1", "--log-json") as server:
        expected = text(server)
        readers = [Reader(server, {**ENDLESS, "n": n}) for n in (1, 3)]
        wait_for(lambda: running(server) == 4 and all(len(reader.found) > 6 for reader in readers), 10)
        queries = server.metric("vllm:prefix_cache_queries_total")
        assert queries > 0
        killed_at = time.monotonic()
        kill_engine(server)
        for reader in readers:
            reader.join(5)
            assert chunks(reader.found)[-1]["error"]["code"] == "engine_dead"
            assert reader.ended_at - killed_at < TOLD_S
        assert probe(server) == probe(server, "/ready") == (503, "engine loading")
        refused = server.post("/v1/chat/completions", COUNT)
        check_error(refused, 503, None, "engine_loading")
        assert 1 <= int(refused.headers["retry-after"]) < READY_S
        assert running(server) == 0
        wait_ready(server)
        assert time.monotonic() - killed_at < READY_S
        assert text(server) == expected
        assert server.metric("gptq_api:engine_restarts_total") == 1
        assert server.metric("gptq_api:requests_cancelled_total", cause="engine_dead") == len(readers)
        assert server.metric("vllm:prefix_cache_queries_total") > queries, "counters go on from where they were"
        assert server.metric("vllm:kv_cache_usage_perc") == 0
        kill_engine(server)
        assert probe(server) == (503, "engine dead")
        assert server.wait() == 70
        lines = [json.loads(line) for line in server.log().splitlines()]
        events = [line["event"] for line in lines]
        assert sum("was killed (SIGKILL" in event and "started again" in event for event in events) == 1
        assert lines[-1]["exit_status"] == 70 and "Traceback" not in server.log()


def open_descriptors(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def threads(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))


def children(server: Server) -> int:
    """Those that ended and were not waited for, too."""
    tasks = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    return len(" ".join(task.read_text() for task in tasks).split())


def test_deaths_in_a_row_leak_nothing() -> None:
    with Server("--restart-engine", str(DEATHS), "--max-queued-requests", "4") as server:
        expected = text(server)
        before = open_descriptors(server), threads(server), children(server)
        for _ in range(DEATHS):
            reader = Reader(server, {**ENDLESS, "n": 4})
            wait_for(lambda: running(server) == 4, 10)
            kill_engine(server)
            reader.join(5)
            wait_ready(server)
            assert running(server) == 0
            wait_for(lambda: (open_descriptors(server), threads(server), children(server)) == before, 5)
        assert text(server) == expected
        assert server.metric("gptq_api:engine_restarts_total") == DEATHS


def test_a_server_that_is_stopped_while_its_engine_loads_again_leaves_at_once() -> None:
    with Server("--restart-engine", "1") as server:
        others = {*server.children()} - {server.engine_pid}
        kill_engine(server)
        engine = wait_for(lambda: {*server.children()} - others, 5).pop()
        started = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - started < 5 and not alive(engine)
        assert "Traceback" not in server.log() and "never retrieved" not in server.log()


def stall_engine(server: Server) -> None:
    reader, engine = Reader(server, ENDLESS), server.engine_pid
    wait_for(lambda: len(reader.found) > 3, 10)
    os.kill(engine, signal.SIGSTOP)
    stopped_at = time.monotonic()
    wait_for(lambda: not alive(engine), 5)
    reader.join(5)
    assert reader.ended_at - stopped_at < 1 + TOLD_S
    assert chunks(reader.found)[-1]["error"]["code"] == "engine_stalled"


@pytest.mark.alone
def test_a_stalled_engine_can_be_killed() -> None:
    """And is then one that died: started again, or the end of the server."""
    flags = ("--engine-timeout-s", "1", "--on-engine-stall", "kill", "--restart-engine", "1")
    with Server(*flags) as server:
        expected = text(server)
        stall_engine(server)
        wait_ready(server)
        assert text(server) == expected
        stall_engine(server)
        assert server.wait() == 70
