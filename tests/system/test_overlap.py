"""The demo model one step ahead, through the engine process: what users get is what they get without."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Server, wait_for

TESTS = Path(__file__).parents[1]
QUESTIONS: list[dict[str, Any]] = json.loads((TESTS / "demo_questions.json").read_text(encoding="utf-8"))

ONE_AHEAD = """
import sys
if "gptq_api.engine.process" in sys.orig_argv:
    from tests.support.lagging_runner import LaggingRunner
    from gptq_api.runner import load as runner
    load = runner.load_runner
    runner.load_runner = lambda settings: LaggingRunner(load(settings))
"""


@pytest.fixture(scope="module")
def one_ahead(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """In exact arithmetic, with a cache so small that sequences preempt each other."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(ONE_AHEAD)
    path = os.pathsep.join(filter(None, [str(folder), str(TESTS.parent), os.environ.get("PYTHONPATH")]))
    with Server("--dtype", "float32", "--block-size", "4", "--num-blocks", "90", env={"PYTHONPATH": path}) as running:
        yield running


@pytest.fixture(scope="module")
def one_at_a_time() -> Iterator[Server]:
    with Server("--dtype", "float32", "--block-size", "4") as running:
        yield running


def requests() -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = []
    for i, entry in enumerate(entry for entry in QUESTIONS if len(entry["exact"]) < 200):
        asked.append({"content": entry["question"], "temperature": 0})
        asked.append({"content": entry["question"], "temperature": 1.5, "seed": i, "max_tokens": 1 + i % 7, "n": 2})
        asked.append({"content": entry["question"], "temperature": 1.5, "seed": i, "stop": ["e"], "top_p": 0.9})
        asked.append({"content": entry["question"], "temperature": 0, "max_tokens": 24, "ignore_eos": True})
        asked.append({"content": entry["question"], "temperature": 1, "seed": i, "frequency_penalty": 1.0})
        asked.append({"content": entry["question"], "temperature": 0, "logprobs": True, "top_logprobs": 2})
        asked.append({"content": entry["question"], "temperature": 1, "seed": i, "min_tokens": 12, "max_tokens": 40})
    return asked[:42]


def answers(server: Server) -> list[Any]:
    def ask(fields: dict[str, Any]) -> Any:
        response = server.chat(**fields)
        assert response.status_code == 200, response.text
        body = response.json()
        tokens = {k: v for k, v in body["usage"].items() if k.endswith("_tokens")}
        return body["choices"], tokens

    with ThreadPoolExecutor(24) as pool:
        return list(pool.map(ask, requests()))


def test_the_same_answers_to_every_kind_of_request(one_ahead: Server, one_at_a_time: Server) -> None:
    assert answers(one_ahead) == answers(one_at_a_time)
    assert one_ahead.metric("vllm:num_preemptions_total") > 0
    assert one_ahead.metric("vllm:prefix_cache_hits_total") > 0


def test_clients_that_leave_take_their_memory_with_them(one_ahead: Server) -> None:
    one_ahead.wait_idle()
    fields = {"messages": [{"role": "user", "content": "Tell me a story."}], "ignore_eos": True, "stream": True}
    for _ in range(5):
        with one_ahead.http.stream("POST", "/v1/chat/completions", json=fields) as response:
            next(response.iter_lines())
    one_ahead.wait_idle()
    wait_for(lambda: one_ahead.metric("vllm:kv_cache_usage_perc") == 0, 3)
    assert one_ahead.chat(QUESTIONS[0]["question"], temperature=0).status_code == 200
    assert "Traceback" not in one_ahead.log()
