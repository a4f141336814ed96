"""A request that comes from this process: the same routes, and so the same fields, refusals and limits, as one that
comes by a socket."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Scope

_BEHALF = "on_behalf_of"


@dataclass(slots=True)
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    error: str | None = None
    """its code"""


def behalf_of(scope: Scope) -> str | None:
    """Whose request it is (Caller.identity), where it was made here; None for one that came by a socket, which knows no
    such thing."""
    behalf: str | None = scope["state"].get(_BEHALF)
    return behalf


async def post(app: ASGIApp, path: str, body: bytes, behalf: str) -> Answer:
    """The answer to a JSON body. `app`: with its middlewares. Cancelling it is a client that leaves."""
    answer, pieces = Answer(), list[bytes]()
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
        else:
            pieces.append(message.get("body", b""))

    scope = _scope(path, len(body), behalf)
    await app(scope, receive, send)
    answer.body = b"".join(pieces)
    answer.error = scope["state"]["record"].error
    return answer


def _scope(path: str, size: int, behalf: str) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % size),
        ],
        "client": None,
        "server": None,
        "state": {_BEHALF: behalf},
    }
