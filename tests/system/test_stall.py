"""An engine that hangs is told from one that rests; nobody waits for it, and when it wakes up all is as before."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gptq_api.config import Settings
from gptq_api.engine.client import EngineClient, EngineStalled, Prompt
from gptq_api.engine.silence import SilenceWatch
from gptq_api.types import SamplingParams
from tests.support.hand_fed_engine import HandFedEngine
from tests.support.server import RawStream, Server, alive, chat_body, check_error, chunks, wait_for
from tests.system.test_life import Reader, running

pytestmark = pytest.mark.usefixtures("slow_engine")
ENDLESS: dict[str, Any] = chat_body("Tell me a story.", ignore_eos=True, temperature=0, stream=True)


def test_health_says_that_the_engine_is_silent_over_its_work() -> None:
    with Server("--engine-timeout-s", "1") as server:

        def probe(path: str = "/health") -> tuple[int, str]:
            response = server.http.get(path)
            return response.status_code, response.json()["status"]

        with server.http.stream("POST", "/v1/chat/completions", json=ENDLESS) as stream:
            next(stream.iter_lines())
        server.wait_idle()
        assert server.chat(max_tokens=2).status_code == 200
        time.sleep(1.5)
        assert probe() == (200, "ok"), "after an abort and an answer it owes nothing"
        assert server.metric("vllm:kv_cache_usage_perc") == 0
        engine = server.engine_pid
        with server.http.stream("POST", "/v1/chat/completions", json=ENDLESS) as stream:
            lines = stream.iter_lines()
            for _ in range(5):
                next(lines)
            assert server.metric("vllm:kv_cache_usage_perc") > 0
            os.kill(engine, signal.SIGSTOP)
            try:
                wait_for(lambda: probe() == (503, "engine stalled"), 5)
                assert probe("/ready") == (503, "engine stalled")
                stream.close()
                time.sleep(0.2)
                assert probe() == (503, "engine stalled"), "also when all who waited have left"
            finally:
                os.kill(engine, signal.SIGCONT)
            wait_for(lambda: probe() == (200, "ok") and probe("/ready") == (200, "ready"), 5)
        wait_for(lambda: server.metric("vllm:kv_cache_usage_perc") == 0, 5)


def check_told(found: list[bytes]) -> None:
    """A stream that ended with the error and [DONE]."""
    last = chunks(found)[-1]
    assert last["error"]["code"] == "engine_stalled" and last["error"]["type"] == "server_error"
    assert last["error"].keys() >= {"message", "type", "param", "code"}


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.alone
def test_who_waits_is_told_and_who_comes_is_refused_until_it_speaks_again() -> None:
    count = chat_body("Count from one to ten.", max_tokens=16, ignore_eos=True, temperature=0)
    with Server("--engine-timeout-s", "1", "--log-json") as server:
        expected = server.post("/v1/chat/completions", count).json()["choices"][0]["message"]
        whole: list[tuple[float, httpx.Response]] = []

        def ask(**fields: Any) -> threading.Thread:
            def run() -> None:
                answer = server.post("/v1/chat/completions", {**ENDLESS, "stream": False, **fields})
                whole.append((time.monotonic(), answer))

            thread = threading.Thread(target=run)
            thread.start()
            return thread

        readers = [Reader(server, {**ENDLESS, "n": n}) for n in (1, 1, 3)]
        threads = [ask(), ask(n=2)]
        wait_for(lambda: running(server) == 8 and all(len(reader.found) > 6 for reader in readers), 10)
        with stopped(server.engine_pid):
            started = time.monotonic()
            threads += [ask(), ask(n=4)]  # while it is silent, but not yet for long
            wait_for(lambda: running(server) == 13, 0.8)
            for thread in [*readers, *threads]:
                thread.join(5)
            for reader in readers:
                check_told(reader.found)
                assert reader.ended_at - started < 2
            for ended_at, answer in whole:
                check_error(answer, 503, None, "engine_stalled")
                assert int(answer.headers["retry-after"]) > 0 and ended_at - started < 2
            assert len(whole) == 4
            assert running(server) == 0, "their places are free"
            for path, body in (
                ("/v1/chat/completions", count),
                ("/v1/chat/completions", ENDLESS),
                ("/v1/completions", {"prompt": ["x"] * 3}),
            ):
                refused = server.post(path, body)
                check_error(refused, 503, None, "engine_stalled")
                assert int(refused.headers["retry-after"]) > 0
            assert server.metric("vllm:admission_rejections_total", reason="unavailable") == 3
            assert server.metric("gptq_api:requests_cancelled_total", cause="engine_stalled") == 7
        wait_for(lambda: server.http.get("/health").status_code == 200, 5)
        assert server.post("/v1/chat/completions", count).json()["choices"][0]["message"] == expected
        wait_for(lambda: server.metric("vllm:kv_cache_usage_perc") == 0, 5)
        assert running(server) == 0
        log = [json.loads(line) for line in server.log().splitlines()]
        assert sum(line.get("outcome") == "engine_stalled" for line in log) == 7
        events = [line["event"] for line in log]
        assert events.count("the engine has been silent over its work for 1 s; 13 sequences are given up") == 1
        assert events.count("the engine speaks again") == 1
        assert "Traceback" not in server.log()


def test_a_slow_reader_keeps_no_place() -> None:
    """It is told when it reads; its place is free at once."""
    wide = {**ENDLESS, "logprobs": True, "top_logprobs": 20}
    with Server("--engine-timeout-s", "1", "--max-queued-requests", "1") as server:
        raw = RawStream(server, wide, rcvbuf=4096)
        wait_for(lambda: server.metric("vllm:iteration_tokens_total_count") > 300, 30)
        assert running(server) == 1
        with stopped(server.engine_pid):
            wait_for(lambda: running(server) == 0, 3)
        wait_for(lambda: server.http.get("/health").status_code == 200, 5)
        assert server.chat(max_tokens=2).status_code == 200
        status, _ = raw.head()
        assert status == 200
        check_told(list(raw.events()))
        raw.close()
        assert "Traceback" not in server.log()


@pytest.mark.alone
@pytest.mark.parametrize("when", ["stalled", "not yet stalled", "at the deadline"])
def test_the_end_of_a_server_whose_engine_is_silent(when: str) -> None:
    """Whether the silence is known, comes out while the server drains, or never does."""
    timeout = "60" if when == "at the deadline" else "1"
    with Server("--engine-timeout-s", timeout, "--drain-timeout-s", "4") as server:
        engine = server.engine_pid
        reader = Reader(server, ENDLESS)
        wait_for(lambda: len(reader.found) > 3, 10)
        with stopped(engine):
            if when == "stalled":
                wait_for(lambda: server.http.get("/health").status_code == 503, 5)
            started = time.monotonic()
            server.signal(signal.SIGTERM)
            assert server.wait(10) == 0
            assert time.monotonic() - started < (7 if when == "at the deadline" else 3)
            reader.join(5)
            if when == "at the deadline":
                assert chunks(reader.found)[-1]["error"]["code"] == "server_shutting_down"
            else:
                check_told(reader.found)
            wait_for(lambda: not alive(engine), 3)
        assert "Traceback" not in server.log()


@pytest.mark.parametrize(("device", "asked", "seconds"), [("cpu", None, 600), ("cuda:0", None, 60), ("cpu", 2.5, 2.5)])
def test_how_long_an_engine_may_be_silent(device: str, asked: float | None, seconds: float) -> None:
    client = EngineClient(Settings(engine_timeout_s=asked))
    client.ready = SimpleNamespace(device=device)  # type: ignore[assignment]
    assert client.timeout_s == seconds


async def test_a_lively_engine_costs_no_timer_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    client = HandFedEngine(0.2)
    looks: list[float] = []
    look = SilenceWatch._look

    def noted(watch: SilenceWatch, due: float) -> None:
        looks.append(due)
        look(watch, due)

    monkeypatch.setattr(SilenceWatch, "_look", noted)
    with client.submit([Prompt([1], [SamplingParams(max_tokens=5)])]):
        for _ in range(100):
            client.step(num_running=1)
            await asyncio.sleep(0.005)
        assert 1 <= len(looks) <= 8 and not client.stalled
    client.step(num_running=0)
    await asyncio.sleep(0.3)
    assert client._silence._timer is None, "nothing is owed, so nobody looks"


async def test_who_was_stopped_together_with_its_engine_gives_it_its_time() -> None:
    client = HandFedEngine(0.1)
    with client.submit([Prompt([1], [SamplingParams(max_tokens=5)])]) as generation:
        time.sleep(1.3)  # neither runs, as with ^Z
        await asyncio.sleep(0.02)
        assert not client.stalled and client.num_admitted == 1
        with pytest.raises(EngineStalled):
            async for _ in generation:
                pass
        assert client.num_admitted == 0
        with pytest.raises(EngineStalled), client.submit([Prompt([1], [SamplingParams(max_tokens=5)])]):
            pass
    assert len(client.sent) == 2, "one prompt, one abort"
    client.step(num_running=0)
    assert not client.stalled
