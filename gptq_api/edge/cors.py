"""Which web pages may read our answers: without this a browser lets none but our own.

Pure ASGI, inside the request log and outside of keys: a browser sends no key with the question whether it may ask.
Credentials (cookies) are never allowed; keys travel in headers that the page itself sets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptq_api.edge.errors import ErrorBody

ANY = "*"
EXPOSED = (
    "x-request-id, openai-processing-ms, retry-after, retry-after-ms, x-unsupported-params, x-max-tokens, "
    "x-dropped-system-line, request-id, x-should-retry, www-authenticate, "
    "x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    "x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
"""headers of answers that a page may read, besides those that every page may"""
METHODS = "GET, HEAD, POST, DELETE"
MAX_AGE_S = 600
"""for so long a browser need not ask again"""
_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}(?:\s*,\s*[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}){0,63}")


class CorsMiddleware:
    """`origins`: those that are allowed, as browsers spell them, or ANY."""

    def __init__(self, app: ASGIApp, origins: Sequence[str], error_body: ErrorBody) -> None:
        self.app = app
        self._origins = frozenset(origins)
        self._any = ANY in self._origins
        self._error_body = error_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            return await self._preflight(origin, headers, send)
        told = self._told(origin)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *told]
            await send(message)

        return await self.app(scope, receive, with_headers)

    def _told(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        """Headers of an answer to a page of this origin."""
        if self._any:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", EXPOSED.encode())]
        vary = [(b"vary", b"origin")]  # also without one: a cache must not give the answer to a page
        if origin is None or origin.lower() not in self._origins:
            return vary
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-expose-headers", EXPOSED.encode()),
            *vary,
        ]

    async def _preflight(self, origin: str, headers: Headers, send: Send) -> None:
        if not self._any and origin.lower() not in self._origins:
            body = self._error_body(403, f"Pages of {origin[:100]} may not use this server: see --cors-origin.")
            return await send_error(send, 403, body, self._told(None))
        answer = [item for item in self._told(origin) if item[0] != b"access-control-expose-headers"]
        answer += [
            (b"access-control-allow-methods", METHODS.encode()),
            (b"access-control-max-age", b"%d" % MAX_AGE_S),
        ]
        asked = headers.get("access-control-request-headers", "")
        if _NAMES.fullmatch(asked):  # as asked: `*` would not stand for Authorization
            answer.append((b"access-control-allow-headers", asked.encode()))
        await send({"type": "http.response.start", "status": 204, "headers": answer})
        return await send({"type": "http.response.body", "body": b""})


async def send_error(send: Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """An answer of the edge's own. `body`: as ErrorBody makes it."""
    told = [*headers, (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": told})
    await send({"type": "http.response.body", "body": body})
