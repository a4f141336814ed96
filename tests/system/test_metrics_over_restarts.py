"""What /metrics says while engines die under load and others take their places: no counter goes down or away, and no
gauge tells of an engine that is not there."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import httpx

from tests.support.loading import LoadingServer
from tests.support.server import Server, chat_body, wait_for

Series = dict[str, float]
TOTAL = re.compile(r"\w+:\w+?_(total|count|sum|bucket)({|$)")
OF_AN_ENGINE = ("vllm:kv_cache_usage_perc", "vllm:cache_config_info", "gptq_api:kernel_info", "gptq_api:kernel_linears")


def scraped(http: httpx.Client) -> Series:
    lines = [line for line in http.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def names(series: Series) -> set[str]:
    return {name.partition("{")[0] for name in series}


def value(series: Series, name: str) -> float:
    (found,) = (value for full, value in series.items() if full.startswith(f"{name}{{"))
    return found


class Load:
    """Streams of a few clients, one after the other, whatever becomes of them; and /metrics, again and again."""

    def __init__(self, server: Server) -> None:
        self.seen: list[Series] = []
        self.done = threading.Event()
        self._port = server.port
        work = [*(lambda number=number: self._ask(number) for number in range(3)), self._scrape]
        self._threads = [threading.Thread(target=target) for target in work]
        for thread in self._threads:
            thread.start()

    def _client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=60, trust_env=False)

    def _ask(self, number: int) -> None:
        with self._client() as http:
            for turn in itertools.count():
                if self.done.is_set():
                    return
                content = f"Count from {number} to {turn % 5 + 9}."
                body: dict[str, Any] = chat_body(content, max_tokens=60, stream=True, stream_options={})
                answer = http.post("/v1/chat/completions", json=body)
                if answer.status_code != 200:
                    self.done.wait(0.1)

    def _scrape(self) -> None:
        with self._client() as http:
            while not self.done.is_set():
                self.seen.append(scraped(http))
                self.done.wait(0.02)

    def stop(self) -> None:
        self.done.set()
        for thread in self._threads:
            thread.join()


def check(before: Series, after: Series) -> None:
    for name, was in before.items():
        if TOTAL.match(name):
            assert after.get(name, -1) >= was, (name, was, after.get(name))
    running, waiting = (value(after, f"vllm:num_requests_{what}") for what in ("running", "waiting"))
    assert running >= 0 and waiting >= 0
    there = names(after) & set(OF_AN_ENGINE)
    assert there in (set(), set(OF_AN_ENGINE)), "all of an engine, or nothing"
    if there:
        assert 0 <= value(after, "vllm:kv_cache_usage_perc") <= 1
    else:
        assert running == waiting == 0


def wait_to_rise(server: Server, counter: str, by: float) -> None:
    aim = server.metric(counter) + by
    wait_for(lambda: server.metric(counter) >= aim, 60)


def test_counters_go_on_and_gauges_are_those_of_an_engine() -> None:
    flags = ("--restart-engine", "5", "--max-num-seqs", "2", "--speculate", "auto")
    with Server(*flags) as server:
        load = Load(server)
        try:
            for death in (1, 2):
                wait_to_rise(server, "vllm:prefix_cache_queries_total", 100)
                wait_for(lambda: server.metric("vllm:num_requests_running") > 0, 20)
                os.kill(server.engine_pid, signal.SIGKILL)
                wait_for(lambda: not names(scraped(server.http)) & set(OF_AN_ENGINE), 20)
                wait_for(lambda: server.http.get("/ready").status_code == 200, 60)
                assert server.metric("gptq_api:engine_restarts_total") == death
                wait_to_rise(server, "vllm:generation_tokens_total", 1)
        finally:
            load.stop()
        assert len(load.seen) > 20
        for before, after in itertools.pairwise(load.seen):
            check(before, after)
        assert any("vllm:kv_cache_usage_perc" not in names(seen) for seen in load.seen)
        server.wait_idle(20)


def test_while_the_model_is_loaded_there_are_none_and_then_all_counters_from_0(tmp_path: Path) -> None:
    with LoadingServer(tmp_path) as loading:
        answer = loading.http.get("/metrics")
        assert answer.status_code == 503 and "vllm:" not in answer.text and int(answer.headers["retry-after"]) > 0
        loading.go()
        loading.wait_ready()
        first = scraped(loading.http)
        assert set(OF_AN_ENGINE) <= names(first)
        assert {value for name, value in first.items() if TOTAL.match(name)} == {0}
        assert loading.chat(max_tokens=2).status_code == 200
        check(first, scraped(loading.http))
