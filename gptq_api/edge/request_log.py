"""Around every request: an id, timing headers, one log line. Pure ASGI: a BaseHTTPMiddleware would hide disconnects."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field
from email.utils import formatdate

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptq_api.edge.auth import NOBODY, Caller
from gptq_api.edge.errors import ErrorBody

log = structlog.get_logger()

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_QUIET = frozenset({"/health", "/ready", "/metrics"})


@dataclass(slots=True)
class RequestRecord:
    """What is known about one HTTP request; becomes its log line. In scope["state"]["record"]."""

    request_id: str
    started: float = field(default_factory=time.monotonic)
    """time.monotonic()"""
    caller: Caller = NOBODY
    """whose it is, as Authenticator.check says"""
    status: int = 0
    notes: dict[str, object] = field(default_factory=dict)
    """what the API adds to the line: how much work it was"""
    at_end: ExitStack = field(default_factory=ExitStack)
    """closed when the answer is sent, or will not be"""
    in_background: bool = False
    """whether it is one of many that nobody waits for, of which the log has a line each at level debug"""
    outcome: str | None = None
    """why it did not end well: disconnect, slow_reader, engine_dead ..."""
    error: str | None = None
    """code of the error that the client got"""


class RequestMiddleware:
    """Outermost. Nothing a request does may raise through it."""

    def __init__(self, app: ASGIApp, error_body: ErrorBody) -> None:
        self.app = app
        self._error_body = error_body
        self.num_requests = 0
        """in flight, from the first header to the last byte of the answer"""
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Returns when no request is in flight."""
        await self._idle.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        record = RequestRecord(_request_id(scope))
        scope["state"]["record"] = record
        self.num_requests += 1
        self._idle.clear()

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"date", formatdate(usegmt=True).encode()),
                    (b"x-request-id", record.request_id.encode()),
                    (b"openai-processing-ms", b"%d" % round((time.monotonic() - record.started) * 1000)),
                    *record.caller.headers(),
                ]
            await send(message)

        try:
            await self.app(scope, receive, stamped)
        except ClientDisconnect:
            record.outcome = "disconnect"
        except Exception:
            log.exception("a request failed by a bug", request_id=record.request_id)
            record.outcome = "bug"
            if not record.status:
                await self._send_500(stamped)
        finally:
            self.num_requests -= 1
            if not self.num_requests:
                self._idle.set()
            record.at_end.close()
            self._log(scope, record)

    async def _send_500(self, send: Send) -> None:
        body = self._error_body(500, "The server had an error while processing the request.")
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 500, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _log(self, scope: Scope, record: RequestRecord) -> None:
        if scope["path"] in _QUIET and record.status < 500:
            return
        fields: dict[str, object] = {
            # the status the client got, or nginx's number for a client that did not wait for one
            "status": 499 if record.outcome == "disconnect" else record.status,
            "ms": round((time.monotonic() - record.started) * 1000, 1),
            "error": record.error,
            **record.notes,
            "outcome": record.outcome,
            "request_id": record.request_id,
        }
        tell = log.debug if record.in_background else log.info
        tell(_line(scope), **{name: value for name, value in fields.items() if value is not None})


def _line(scope: Scope) -> str:
    """Method and path: bounded, printable, without the query."""
    path = "".join(c if c.isprintable() else "?" for c in scope["path"][:100])
    return f"{scope['method'][:10]} {path}"


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return str(value.decode())
    return f"req_{uuid.uuid4().hex}"
