"""Named keys: roles, limits and a file that changes; and that one key does not keep another waiting."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import RawStream, Server, chat_body, check_error, wait_for

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
ENDLESS: dict[str, Any] = {"ignore_eos": True, "temperature": 1.0}
FILE = """
[[key]]
name = "alice"
key = "alice-key"

[[key]]
name = "watcher"
key = "watcher-key"
role = "metrics"

[[key]]
name = "root"
key = "root-key"
role = "admin"

[[key]]
name = "few"
key = "few-key"
requests_per_minute = 2

[[key]]
name = "short"
key = "short-key"
tokens_per_minute = 100

[[key]]
name = "single"
key = "single-key"
max_concurrent = 1
"""


def as_key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}-key"}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(FILE)
    file.chmod(0o600)
    with Server("--api-key-file", str(file), "--max-num-seqs", "2") as server:
        server.http.headers.update(as_key("root"))
        yield server


def test_roles(keyed: Server) -> None:
    for name, path, status in (
        ("alice", "/v1/models", 200),
        ("alice", "/metrics", 403),
        ("watcher", "/metrics", 200),
        ("watcher", "/v1/models", 403),
        ("watcher", "/openapi.json", 403),
        ("root", "/metrics", 200),
        ("root", "/v1/models", 200),
        ("nobody", "/metrics", 401),
    ):
        answer = keyed.http.get(path, headers=as_key(name))
        assert answer.status_code == status, (name, path)
        if status == 403:
            error = check_error(answer, 403, None, "insufficient_permissions")
            assert error["type"] == "permission_error" and "or 'admin'" in error["message"]
    check_error(keyed.http.post(CHAT, content=b"{", headers=as_key("watcher")), 403, None, "insufficient_permissions")
    answer = keyed.http.post(MESSAGES, json=chat_body(max_tokens=1), headers=as_key("watcher"))
    assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error"


def test_what_a_key_uses_is_in_metrics_and_log(keyed: Server) -> None:
    usage = keyed.http.post(CHAT, json=chat_body(max_tokens=3, **ENDLESS), headers=as_key("alice")).json()["usage"]
    assert keyed.metric("gptq_api:key_requests_total", key="alice") == 1
    assert keyed.metric("gptq_api:key_prompt_tokens_total", key="alice") == usage["prompt_tokens"]
    assert keyed.metric("gptq_api:key_generation_tokens_total", key="alice") == 3
    assert keyed.metric("gptq_api:key_requests_running", key="alice") == 0
    lines = [line for line in keyed.log().splitlines() if CHAT in line and "key=alice" in line]
    assert len(lines) == 1 and "alice-key" not in keyed.log()


def test_requests_a_minute(keyed: Server) -> None:
    few = as_key("few")
    left = []
    for _ in range(2):
        answer = keyed.http.post("/tokenize", json={"prompt": "x"}, headers=few)
        assert answer.status_code == 200 and answer.headers["x-ratelimit-limit-requests"] == "2"
        left.append(answer.headers["x-ratelimit-remaining-requests"])
    assert left == ["1", "0"]
    answer = keyed.http.post(CHAT, json=chat_body(max_tokens=1), headers=few)
    error = check_error(answer, 429, None, "rate_limit_exceeded")
    assert error["type"] == "requests" and "Limit 2" in error["message"] and "key few" in error["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 30
    assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
    answer = keyed.http.post(MESSAGES, json=chat_body(max_tokens=1), headers=few)
    assert answer.status_code == 429 and answer.json()["error"]["type"] == "rate_limit_error"
    assert keyed.http.get("/v1/models", headers=few).status_code == 200, "a question is no work"
    assert keyed.metric("gptq_api:key_rejections_total", key="few", limit="requests") == 2
    assert keyed.metric("vllm:admission_rejections_total", reason="rate_limit") >= 2


def test_tokens_a_minute(keyed: Server) -> None:
    short = as_key("short")
    answer = keyed.http.post(CHAT, json=chat_body(max_tokens=5, **ENDLESS), headers=short)
    used = answer.json()["usage"]["total_tokens"]
    assert answer.headers["x-ratelimit-limit-tokens"] == "100"
    assert 0 <= int(answer.headers["x-ratelimit-remaining-tokens"]) - (100 - used) <= 1 + 20
    with keyed.http.stream("POST", CHAT, json=chat_body(max_tokens=60, stream=True, **ENDLESS), headers=short) as told:
        assert told.status_code == 200
        refused = keyed.http.post(CHAT, json=chat_body(max_tokens=60), headers=short)
        error = check_error(refused, 429, None, "rate_limit_exceeded")
        assert error["type"] == "tokens" and "tokens per min (TPM): Limit 100" in error["message"]
        assert 0 < int(refused.headers["retry-after-ms"]) <= int(refused.headers["retry-after"]) * 1000


def test_how_many_at_a_time(keyed: Server) -> None:
    single = as_key("single")
    held = RawStream(keyed, chat_body(stream=True, **ENDLESS), key="single-key")
    held.head()
    try:
        refused = keyed.http.post(CHAT, json=chat_body(max_tokens=1), headers=single)
        error = check_error(refused, 429, None, "rate_limit_exceeded")
        assert error["type"] == "requests" and "concurrent requests: Limit 1" in error["message"]
        assert keyed.http.post(CHAT, json=chat_body(max_tokens=1), headers=as_key("alice")).status_code == 200
    finally:
        held.close()
    answer = wait_for(
        lambda: [
            answer
            for answer in [keyed.http.post(CHAT, json=chat_body(max_tokens=1), headers=single)]
            if answer.status_code == 200
        ],
        5,
    )
    assert answer


def test_a_file_that_changes(tmp_path: Path) -> None:
    """On change and on SIGHUP; a wrong one changes nothing; whoever runs goes on."""
    file = tmp_path / "keys"
    file.write_text("first-key\n")
    file.chmod(0o644)
    with Server("--api-key-file", str(file)) as server:

        def works(name: str) -> bool:
            return server.http.get("/v1/models", headers=as_key(name)).status_code == 200

        assert f"every user of this machine may read the keys in {file}" in server.log()
        assert works("first") and not works("other")
        running = RawStream(server, chat_body(stream=True, max_tokens=200, **ENDLESS), key="first-key")
        assert running.head()[0] == 200
        events = running.events()
        next(events)
        file.write_text("other-key\n")
        wait_for(lambda: works("other"), 10)
        assert not works("first")
        assert list(events)[-1] == b"data: [DONE]"
        running.close()

        file.write_text("not a key\n")
        wait_for(lambda: "the keys stay as they were" in server.log(), 10)
        file.unlink()
        wait_for(lambda: "cannot be read" in server.log(), 10)
        time.sleep(2.5)
        errors = [line for line in server.log().splitlines() if "the keys stay as they were" in line]
        assert len(errors) == 2 and works("other"), "one line for each change"

        file.write_text("third-key\n")
        wait_for(lambda: works("third"), 10)
        before = file.stat()
        with file.open("r+") as unchanged:
            unchanged.write("again-key\n")
            unchanged.flush()
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        time.sleep(1.5)
        assert works("third") and not works("again"), "it looks as it did"
        server.signal(signal.SIGHUP)
        wait_for(lambda: works("again"), 10)
        assert not works("third")
        assert "-key" not in server.log()


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot be read: No such file"), ("", "it holds no key"), ("a b\n", "line 1 is not")]
)
def test_a_wrong_file_at_start_is_a_sentence(content: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    server = Server("--api-key-file", str(file), wait=False)
    try:
        assert server.wait(30) == 2
        assert (
            server.log().count("\n") == 1
            and server.log().startswith("gptq-api serve: key file")
            and words in server.log()
        )
    finally:
        server.close()


def first_token_s(server: Server, key: str, **fields: Any) -> float:
    """Of a streamed answer, from its request to its first text."""
    started = time.monotonic()
    raw = RawStream(server, chat_body("Who are you?", stream=True, max_tokens=5, **fields, **ENDLESS), key=key)
    try:
        assert raw.head()[0] == 200
        for event in raw.events():
            if b'"content":"' in event and b'"content":""' not in event:
                return time.monotonic() - started
    finally:
        raw.close()
    raise AssertionError("no text")


@pytest.mark.alone
def test_a_second_key_does_not_wait_for_the_hundreds_of_requests_of_the_first() -> None:
    """Every request of the first has 300 tokens, four at a time: 30,000 tokens before the second one's turn, if it had
    to wait for them."""
    with Server("--api-key", "greedy-key,modest-key", "--max-num-seqs", "4") as server:
        server.http.headers.update(as_key("modest"))
        alone = min(first_token_s(server, "modest-key") for _ in range(3))
        body = chat_body("Tell me a story.", stream=True, max_tokens=300, **ENDLESS)
        greedy = [RawStream(server, body, key="greedy-key") for _ in range(400)]
        try:
            statuses = [raw.head()[0] for raw in greedy]
            assert statuses.count(200) == 400
            wait_for(lambda: server.metric("vllm:num_requests_waiting") > 350, 20)
            before = server.metric("vllm:generation_tokens_total")
            beside = first_token_s(server, "modest-key")
            assert server.metric("vllm:num_requests_waiting") > 300, "it did wait beside them"
            assert server.metric("vllm:num_preemptions_total") >= 1, "and had a seat made free"
            assert server.metric("vllm:generation_tokens_total") - before < 600, "while they got hardly an answer"
            assert beside < 20 * alone + 2, f"{beside:.2f} s beside them, {alone:.2f} s alone"
        finally:
            for raw in greedy:
                raw.close()
