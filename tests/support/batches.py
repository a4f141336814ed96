"""Requests of a batch whose answers are known by what they ask, and what becomes of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from openai import OpenAI
from openai.types import Batch

from tests.support.server import Server

CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


def request(custom_id: str, body: dict[str, Any], url: str = CHAT) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def count_to(number: int, **fields: Any) -> dict[str, Any]:
    """The body of a chat whose answer tells what was asked."""
    content = f"Count from 1 to {number}."
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 24, **fields}


def counting(num: int) -> list[dict[str, Any]]:
    return [request(f"request-{i}", count_to(i % 7 + 2)) for i in range(num)]


def jsonl(lines: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def client_of(server: Server, key: str = "none") -> OpenAI:
    return OpenAI(base_url=server.url, api_key=key, max_retries=0, timeout=30)


def created(client: OpenAI, data: bytes, window: Any = "24h", **fields: Any) -> Batch:
    file = client.files.create(file=("requests.jsonl", data), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window=window, **fields)


def ended(client: OpenAI, batch: Batch, seconds: float = 100) -> Batch:
    """The batch, when it has ended."""
    until = time.monotonic() + seconds
    while batch.status not in ENDED:
        assert time.monotonic() < until, batch
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    return batch


def lines_of(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def check_counted(asked: list[dict[str, Any]], answered: list[dict[str, Any]]) -> None:
    """Every request has its own answer, once, in their order."""
    assert [line["custom_id"] for line in answered] == [line["custom_id"] for line in asked]
    assert len({line["id"] for line in answered}) == len(asked)
    for line, answer in zip(asked, answered, strict=True):
        assert answer["response"]["status_code"] == 200 and answer["error"] is None, answer
        last = line["body"]["messages"][0]["content"].split()[-1].removesuffix(".")
        text = answer["response"]["body"]["choices"][0]["message"]["content"]
        assert text.split()[-1].removesuffix(".") == last, (line, text)


def files_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / "files").iterdir()}
