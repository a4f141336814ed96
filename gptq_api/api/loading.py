"""While the model loads: the pages are there, probes say so, and everything else is a 503 that says when to ask again.

The port is open then for those who look: a browser that shows the page, a probe, a router. Where the model cannot be
loaded, the server leaves with a sentence and exit status 1, as if nobody had asked.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from gptq_api.api.answers.encoding import json_response
from gptq_api.api.errors import error_response, unavailable

_PAGES = frozenset({"/", "/docs"})
_PROBES = frozenset({"/health", "/ready"})
STATUS = "engine loading"
RETRY_AFTER_S = 2


class Loading:
    """ASGI, around the app: inside of hosts, origins and the request log, and outside of keys."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.done = False
        """whether the app can answer everything"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.done or scope["type"] != "http" or scope["path"] in _PAGES:
            return await self.app(scope, receive, send)
        if scope["path"] in _PROBES:
            answer = json_response({"status": STATUS}, {"retry-after": str(RETRY_AFTER_S)}, 503)
        else:
            error = unavailable("The model is being loaded.", "engine_loading", RETRY_AFTER_S)
            answer = error_response(Request(scope), error.status_code, error.error, error.headers)
        return await answer(scope, receive, send)
