"""/openapi.json is true of files and batches as well: answers have the shapes that stand there, every status that
stands there comes and no other, and schemathesis finds nothing."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.batches import CHAT, counting, jsonl
from tests.support.openapi import check_documented
from tests.support.server import RawStream, Server, chat_body, raw_request, wait_for
from tests.system.test_openapi import EXAMPLES, document_of, schemathesis

KEPT = ("/v1/files", "/v1/batches")
FORM = "Content-Type: multipart/form-data; boundary=b"


class Asked:
    """Asks one operation after the other, holds each answer against the document, and counts the statuses."""

    def __init__(self, server: Server) -> None:
        self.server, self.document = server, document_of(server)
        self.came: dict[tuple[str, str], set[int]] = {}

    def ask(self, method: str, path: str, name: str = "", **options: Any) -> httpx.Response:
        place = path.replace("{file_id}", name).replace("{batch_id}", name)
        answer = self.server.http.request(method.upper(), place, **options)
        check_documented(self.document, path, answer)
        self.count(method, path, answer.status_code)
        return answer

    def count(self, method: str, path: str, status: int) -> None:
        self.came.setdefault((method, path), set()).add(status)

    def upload(self, **options: Any) -> httpx.Response:
        files = {"file": ("a.jsonl", jsonl(counting(2)))}
        return self.ask("post", "/v1/files", files=files, data={"purpose": "batch"}, **options)

    def create(self, file_id: str, **options: Any) -> httpx.Response:
        body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
        return self.ask("post", "/v1/batches", json=body, **options)


def test_every_documented_status_comes_and_no_other(tmp_path: Path) -> None:
    flags = ("--batch-dir", str(tmp_path / "b"), "--batch-file-mib", "1", "--body-timeout-s", "0.5")
    places = ("--max-queued-requests", "1", "--drain-timeout-s", "60")
    with Server("--api-key", "key", *places, *flags) as server:
        server.http.headers["authorization"] = "Bearer key"
        asked = Asked(server)
        ours = {
            (method, path): operation
            for path, operations in asked.document["paths"].items()
            if path.startswith(KEPT)
            for method, operation in operations.items()
        }
        assert len(ours) == 8 + 6, "a new route has to be asked here"
        _provoke(asked, list(ours))
    for (method, path), operation in ours.items():
        said = {int(status) for status in operation["responses"]}
        assert asked.came[method, path] == said, (method, path, asked.came[method, path] ^ said)


def _provoke(asked: Asked, operations: list[tuple[str, str]]) -> None:
    file_id = asked.upload().json()["id"]
    batch_id = asked.create(file_id).json()["id"]
    for method in ("get", "head"):
        for path in KEPT:
            asked.ask(method, path)
            asked.ask(method, path, params={"limit": 0})
        for name in (file_id, "nope", "x" * 65):
            asked.ask(method, "/v1/files/{file_id}", name)
            asked.ask(method, "/v1/files/{file_id}/content", name)
        for name in (batch_id, "nope", "x" * 65):
            asked.ask(method, "/v1/batches/{batch_id}", name)
    wait_for(lambda: asked.ask("get", "/v1/batches/{batch_id}", batch_id).json()["status"] == "completed", 60)
    asked.ask(
        "get", "/v1/files/{file_id}/content", asked.server.http.get(f"/v1/batches/{batch_id}").json()["output_file_id"]
    )
    for name in (batch_id, "nope"):
        asked.ask("post", "/v1/batches/{batch_id}/cancel", name)
    held = RawStream(asked.server, chat_body(ignore_eos=True, stream=True), key="key")
    held.head()
    os.kill(asked.server.engine_pid, signal.SIGSTOP)  # so that a batch is on its way
    running = asked.create(file_id).json()["id"]
    asked.ask("delete", "/v1/files/{file_id}", file_id)
    asked.ask("post", "/v1/batches/{batch_id}/cancel", running)
    for method, path in operations:
        asked.ask(method, path, "nope", headers={"authorization": "Bearer wrong"})
    asked.upload(headers={"content-encoding": "gzip"})
    asked.ask("post", "/v1/files", files={"file": ("a", b"{}")})
    asked.ask("post", "/v1/files", files={"file": ("a", b"x" * 2**21)}, data={"purpose": "batch"})
    asked.create("nope")
    asked.create(file_id, headers={"content-encoding": "gzip"})
    asked.ask("post", "/v1/batches", json={})
    asked.ask("post", "/v1/batches", json={"padding": "x" * 70_000})  # asks for a place before it is read
    asked.ask("delete", "/v1/files/{file_id}", "nope")
    wait_for(lambda: asked.ask("delete", "/v1/files/{file_id}", file_id).status_code == 200, 60)
    for path, kind in (("/v1/files", FORM), ("/v1/batches", "")):
        for length in (100, 10**9):
            asked.count("post", path, _raw_status(asked.server, path, length, kind))
    asked.server.signal()
    try:
        wait_for(lambda: asked.upload().status_code == 503, 30)
        asked.create("file-any")
    finally:
        os.kill(asked.server.engine_pid, signal.SIGCONT)
        held.close()


def _raw_status(server: Server, path: str, length: int, kind: str) -> int:
    """Of a request that announces more than it sends."""
    head = raw_request(path, b"", "Authorization: Bearer key").replace(b"Length: 0", b"Length: %d" % length)
    if kind:
        head = head.replace(b"Content-Type: application/json", kind.encode())
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        sock.sendall(head + b"--b")
        return int(sock.recv(4096).split()[1])


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("examples", EXAMPLES)
def test_schemathesis_finds_nothing(examples: int, tmp_path: Path) -> None:
    """A window that is no time, a file there is not: what the schema allows may be refused."""
    flags = ("--batch-dir", str(tmp_path / "b"), "--api-key", "key")
    with Server("--max-model-len", "64", *flags) as server:
        schemathesis(server, tmp_path, examples, "--include-path-regex", "^/v1/(files|batches)")
        assert "Traceback" not in server.log()
