"""An engine that hangs is told from one that rests."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from server import Server, chat_body, wait_for

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
