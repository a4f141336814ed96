"""The main job on real input: the demo model answers right through sockets, in any company, on either path."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.support.server import Server, wait_for

TESTS = Path(__file__).parents[1]
QUESTIONS: list[dict[str, Any]] = json.loads((TESTS / "demo_questions.json").read_text(encoding="utf-8"))


def sdk(server: Server) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def answer(client: OpenAI, question: str, **options: Any) -> str:
    messages: Any = [{"role": "user", "content": question}]
    reply = client.chat.completions.create(model="demo", messages=messages, **options)
    assert reply.choices[0].finish_reason == "stop"
    return str(reply.choices[0].message.content)


@pytest.fixture(scope="module")
def exact_server() -> Any:
    """The float32 path, with a cache so small that 32 sequences preempt each other."""
    with Server("--dtype", "float32", "--block-size", "4", "--num-blocks", "90", "--speculate", "auto") as running:
        yield running


@pytest.mark.parametrize("entry", QUESTIONS, ids=lambda entry: entry["question"])
def test_greedy_answers_are_right(server: Server, entry: dict[str, Any]) -> None:
    assert answer(sdk(server), entry["question"], temperature=0) == entry["exact"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sampled_answers_are_right(server: Server, seed: int) -> None:
    client = sdk(server)
    with ThreadPoolExecutor(8) as pool:
        replies = pool.map(lambda e: answer(client, e["question"], temperature=0.7, seed=seed), QUESTIONS)
    wrong = [
        (entry["question"], reply)
        for entry, reply in zip(QUESTIONS, replies, strict=True)
        if not all(words in reply for words in entry["expect"])
    ]
    assert not wrong


def test_the_same_answers_beside_31_others_with_preemption_and_prefix_hits(
    server: Server, exact_server: Server
) -> None:
    short = [entry for entry in QUESTIONS if len(entry["exact"]) < 300]
    crowd = [short[i % len(short)] for i in range(44)]
    for running in (server, exact_server):
        client = sdk(running)
        with ThreadPoolExecutor(32) as pool:
            replies = list(pool.map(lambda e, c=client: answer(c, e["question"], temperature=0), crowd))
        assert replies == [entry["exact"] for entry in crowd]
    assert exact_server.metric("vllm:num_preemptions_total") > 0
    assert server.metric("vllm:prefix_cache_hits_total") > 0


def test_a_seed_gives_the_same_text_in_any_company(server: Server) -> None:
    client = sdk(server)

    def ramble(seed: int) -> str:
        reply = client.completions.create(model="demo", prompt="The fox", temperature=2, seed=seed, max_tokens=40)
        return reply.choices[0].text

    alone = [ramble(seed) for seed in range(4)]
    with ThreadPoolExecutor(24) as pool:
        crowd = list(pool.map(lambda i: ramble(i % 4), range(24)))
    assert crowd == [alone[i % 4] for i in range(24)]
    assert len(set(alone)) == 4


def test_the_sdk_streams_over_time_with_usage(server: Server) -> None:
    arrivals, text, usage = [], "", None
    stream = sdk(server).chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Count to ten."}],
        temperature=0,
        max_tokens=400,
        extra_body={"ignore_eos": True},
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            arrivals.append(time.perf_counter())
            text += chunk.choices[0].delta.content
        usage = chunk.usage or usage
    assert text.startswith("1, 2, 3, 4, 5, 6, 7, 8, 9, 10")
    assert len(arrivals) > 5 and arrivals[-1] - arrivals[0] > 0.01
    assert usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens >= len(arrivals)


def test_a_conversation_reuses_its_prefix(server: Server) -> None:
    client = sdk(server)
    messages: list[Any] = [{"role": "user", "content": "What is GPTQ?"}]
    first = client.chat.completions.create(model="demo", messages=messages, temperature=0)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "Thanks!"},
    ]
    second = client.chat.completions.create(model="demo", messages=messages, temperature=0)
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens or 0
    assert cached >= 16 and cached % 16 == 0


def test_a_late_short_request_ends_before_an_early_long_one(server: Server) -> None:
    client, ended = sdk(server), {}

    def run(name: str, **options: Any) -> None:
        messages: Any = [{"role": "user", "content": "Tell me a story about a fox."}]
        client.chat.completions.create(model="demo", messages=messages, **options)
        ended[name] = time.perf_counter()

    long = threading.Thread(target=run, args=("long",), kwargs={"max_tokens": 600, "extra_body": {"ignore_eos": True}})
    long.start()
    wait_for(lambda: server.metric("vllm:num_requests_running") >= 1, 10)
    run("short", max_tokens=5)
    long.join()
    assert ended["short"] < ended["long"]


def test_32_streams_share_the_steps_that_one_has_for_itself() -> None:
    """Continuous batching and not turns, counted: what it gives in tokens per second is for benchmarks/serve.py, on a
    machine that has nothing else to do."""
    steps, tokens = "vllm:iteration_tokens_total_count", "vllm:generation_tokens_total"

    def tokens_a_step(server: Server, users: int) -> float:
        before = server.metric(steps), server.metric(tokens)
        script = TESTS.parent / "benchmarks" / "serve.py"
        command = [sys.executable, str(script), "--url", f"http://127.0.0.1:{server.port}/v1"]
        command += ["--concurrency", str(users), "--requests", "4", "--max-tokens", "48", "--out", "/dev/stdout"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout[done.stdout.index("{") :])["rows"][0]
        assert row["failed"] == 0 and row["output_tokens"] == 48 * row["requests"]
        return (server.metric(tokens) - before[1]) / (server.metric(steps) - before[0])

    with Server() as server:
        assert tokens_a_step(server, 1) <= 1
        assert tokens_a_step(server, 32) > 10
