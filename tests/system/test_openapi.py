"""/openapi.json is true: of every route, real answers have the shapes that stand there, every status that stands there
comes, no other comes, and schemathesis finds nothing."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.openapi import Document, check_documented
from tests.support.server import RawStream, Server, chat_body, raw_request, wait_for
from tests.system.test_life import FAULTS

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
LIMITS = {RESPONSES: "max_output_tokens"}
"""where `max_tokens` is called so"""
BODIES: dict[str, dict[str, Any]] = {
    CHAT: chat_body(max_tokens=8, ignore_eos=True),
    COMPLETIONS: {"prompt": "Hello", "max_tokens": 8, "ignore_eos": True},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [5, 6]},
    "/apply-template": chat_body(),
    "/v1/chat/completions/input_tokens": chat_body(),
    RESPONSES: {"input": "Hello", "max_output_tokens": 8, "ignore_eos": True},
    MESSAGES: chat_body(max_tokens=8, ignore_eos=True),
    MESSAGES + "/count_tokens": chat_body(),
}
"""of every route that takes one: a body that is fine"""
NAMED = {"/v1/models/{model}": "/v1/models/{}"}
"""places that hold the name of a model"""
EXAMPLES = [8, pytest.param(50, marks=pytest.mark.attack)]
"""that schemathesis makes for a part of each request"""
USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((path, {}) for path in BODIES),
    (CHAT, {"stream": True}),
    (CHAT, {"stream": True, "logprobs": True, "top_logprobs": 2, "n": 2, **USAGE}),
    (CHAT, {"logprobs": True, "top_logprobs": 20, "n": 2, "temperature": 2, "skip_special_tokens": False}),
    (CHAT, {"frobnicate": 1}),
    (
        CHAT,
        {"prediction": {"type": "content", "content": [{"type": "text", "text": "Hello"}]}, "stream": True, **USAGE},
    ),
    (COMPLETIONS, {"stream": True, "echo": True}),
    (COMPLETIONS, {"stream": True, "logprobs": 2, **USAGE}),
    (COMPLETIONS, {"logprobs": 5, "best_of": 2, "prompt": ["a", "b"]}),
    (COMPLETIONS, {"logprobs": 0, "max_tokens": 1}),
    (COMPLETIONS, {"echo": True, "logprobs": 2, "max_tokens": 0, "n": 2, "prompt_logprobs": 20}),
    (COMPLETIONS, {"stream": True, "echo": True, "logprobs": 20, **USAGE}),
    (CHAT, {"prompt_logprobs": 1}),
    ("/tokenize", {"return_token_strs": True}),
    ("/tokenize", {"prompt": None, "content": "Hello \U0001f600", "with_pieces": True}),
    ("/tokenize", {"prompt": None, "content": "Hello"}),
    (RESPONSES, {"stream": True, "include": ["message.output_text.logprobs"], "top_logprobs": 2}),
    (RESPONSES, {"max_output_tokens": 10**6, "input": [{"role": "user", "content": "Hello"}], "ignore_eos": False}),
    (MESSAGES, {"stream": True, "system": "x-anthropic-billing-header: a\nHi"}),
    (MESSAGES, {"max_tokens": 10**6, "ignore_eos": False, "stop_sequences": ["e"]}),
    (CHAT, {"max_tokens": 10**6}),
    (CHAT, {"temperature": "hot"}),
]


def document_of(server: Server) -> Document:
    document: Document = server.http.get("/openapi.json").json()
    return document


def posts(document: Document) -> set[str]:
    return {path for path, operations in document["paths"].items() if "post" in operations}


def test_answers_are_what_the_document_says(server: Server) -> None:
    document = document_of(server)
    assert posts(document) == BODIES.keys(), "a new route needs a body above"
    for path, fields in VARIANTS:
        check_documented(document, path, server.post(path, {**BODIES[path], **fields}))
    for path in document["paths"].keys() - BODIES.keys():
        for method in document["paths"][path]:
            place = NAMED.get(path, path).format("demo")
            check_documented(document, path, server.http.request(method.upper(), place))


def test_every_documented_status_comes_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULTS)
    env = {"PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))}
    keys = {"key": "admin", "user": "user", "watcher": "metrics", "spent": "user"}
    file = tmp_path / "keys"
    file.write_text("".join(f'[[key]]\nname = "{key}"\nkey = "{key}"\nrole = "{role}"\n' for key, role in keys.items()))
    with file.open("a") as last:
        last.write("requests_per_minute = 1\n")
    flags = ("--body-timeout-s", "0.5", "--max-queued-requests", "1", "--engine-timeout-s", "5")
    with Server("--api-key-file", str(file), *flags, env=env) as server:
        server.http.headers["authorization"] = "Bearer key"
        document = document_of(server)
        came = _provoked(server, document)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            said = {int(status) for status in operation["responses"]}
            assert came[method, path] == said, (method, path, came[method, path] ^ said)


def _provoked(server: Server, document: Document) -> dict[tuple[str, str], set[int]]:
    """Whatever can go wrong with every route, once each, held against the document; the statuses that came."""
    came: dict[tuple[str, str], set[int]] = {}

    def ask(path: str, method: str, place: str = "", **options: Any) -> None:
        answer = server.http.request(method.upper(), place or NAMED.get(path, path).format("demo"), **options)
        check_documented(document, path, answer)
        came.setdefault((method, path), set()).add(answer.status_code)

    def everywhere(headers: dict[str, str] | None = None) -> None:
        for path, operations in document["paths"].items():
            for method in operations:
                ask(path, method, json=BODIES[path] if method == "post" else None, headers=headers)

    everywhere()
    for key in ("wrong", "user", "watcher"):
        everywhere(headers={"authorization": f"Bearer {key}"})
    for path, body in BODIES.items():
        ask(path, "post", json=body, headers={"authorization": "Bearer spent"})
    for path, place in NAMED.items():
        for method in document["paths"][path]:
            ask(path, method, place=place.format("nope"))
            ask(path, method, place=place.format("x" * 600))
    json_type = {"content-type": "application/json"}
    for length, data in ((10**9, b""), (100, b"{")):
        begun = {path: _begun(server, path, length, data) for path in BODIES}  # all wait at the same time
        for path, sock in begun.items():
            with sock:
                came["post", path].add(int(sock.recv(4096).split()[1]))
    for path, body in BODIES.items():
        ask(path, "post", content=b"{", headers=json_type)
        ask(path, "post", json={**body, "model": "nope"})
        ask(path, "post", content=b"{}", headers={**json_type, "content-encoding": "gzip"})
        if "500" in document["paths"][path]["post"]["responses"]:
            ask(path, "post", json={**body, LIMITS.get(path, "max_tokens"): 20, "seed": 666})
    os.kill(server.engine_pid, signal.SIGSTOP)
    try:
        for path, body in BODIES.items():
            if "504" in document["paths"][path]["post"]["responses"]:
                ask(path, "post", json=body, headers={"x-request-timeout": "0.2"})
    finally:
        os.kill(server.engine_pid, signal.SIGCONT)
    held = RawStream(server, chat_body(ignore_eos=True, stream=True), key="key")
    large = {"tokens": [7] * 50_000}  # asks for a place before it is read
    held.head()
    next(held.events())
    os.kill(server.engine_pid, signal.SIGSTOP)
    try:
        everywhere()  # the one place is taken
        ask("/detokenize", "post", json=large)
        wait_for(lambda: server.http.get("/health").status_code == 503, 60)
        everywhere()
        ask("/detokenize", "post", json=large)
    finally:
        os.kill(server.engine_pid, signal.SIGCONT)
        held.close()
    return came


def _begun(server: Server, path: str, length: int, data: bytes) -> socket.socket:
    """A request that announces more than it sends."""
    head = raw_request(path, b"", "Authorization: Bearer key").replace(b"Length: 0", b"Length: %d" % length)
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    sock.sendall(head + data)
    return sock


def schemathesis(server: Server, folder: Path, examples: int, *more: str) -> None:
    """All checks but one: a body may keep to the schema and be wrong for this model, such as an id beyond its
    vocabulary or a prompt longer than its context, and is answered 400 then.

    It keeps all that it made and got, so a quarter of its time would go into looking for garbage there; and requests
    searches all of the environment for proxies, twice for each request."""
    code = "import gc; gc.disable(); from schemathesis.cli import schemathesis; schemathesis()"
    command = [sys.executable, "-c", code, "run", f"http://127.0.0.1:{server.port}/openapi.json"]
    command += ["--header", "Authorization: Bearer key", *more]
    command += ["--exclude-checks", "positive_data_acceptance", "--seed", "1", "--max-examples", str(examples)]
    command += ["--generation-database", "none", "--no-color", "--request-timeout", "30", "--warnings", "off"]
    done = subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("examples", EXAMPLES)
def test_schemathesis_finds_nothing(examples: int, tmp_path: Path) -> None:
    """A body may ask for a 504, by a timeout of a millisecond. The largest arrays that are made are longer than a body
    may be for this context."""
    (tmp_path / "schemathesis.toml").write_text(
        '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", 504]\n'
    )
    with Server("--max-model-len", "64", "--api-key", "key", "--max-body-bytes", str(8 * 2**20)) as server:
        schemathesis(server, tmp_path, examples)
        server.http.headers["authorization"] = "Bearer key"
        assert server.metric("vllm:generation_tokens_total") > 100, "it came past the key"
        assert "Traceback" not in server.log()


def test_the_page_needs_nothing_from_another_host(server: Server, strict_server: Server) -> None:
    for running in (server, strict_server):
        answer = running.http.get("/docs", headers={"authorization": ""})
        check_documented(document_of(running), "/docs", answer)
        assert not re.search(r"(?:https?:)?//[a-z]|@import|url\(|innerHTML", answer.text)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
        (script,) = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
        assert not re.search(r"\son\w+=|style=", answer.text), "the policy lets none of these run"
