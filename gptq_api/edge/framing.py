"""h11, and what it leaves to its user: which requests that it can read are not for us, and where the others go."""

from __future__ import annotations

import re
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import CLOSE_HEADER

from gptq_api.edge.hosts import host_name

_ABSOLUTE = re.compile(rb"https?://([^/?#]*)([^#]*)", re.IGNORECASE)


class EdgeConnection(h11.Connection):
    refusal: str | None = None
    """why a request that is valid HTTP for h11 is not for us"""
    wants_no_body = False
    """whether the answer to the last request, a HEAD, is its headers alone"""

    def next_event(self) -> Any:
        """Requests are refused here before anyone acts upon them, whatever they ask for. Raises RemoteProtocolError."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.wants_no_body = event.method == b"HEAD"
            self.refusal = _refusal(event)
            if self.refusal is None:
                event = _with_path(event)
                self.refusal = _wrong_target(event)
            if self.refusal is not None:
                raise h11.RemoteProtocolError(self.refusal)
        return event

    def send(self, event: Any) -> Any:
        """An answer that comes before the end of the body says that the rest of it will not be read."""
        if isinstance(event, h11.Response) and self.their_state is h11.SEND_BODY and CLOSE_HEADER not in event.headers:
            headers = [*event.headers, CLOSE_HEADER]
            event = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
        return super().send(event)


def _refusal(request: h11.Request) -> str | None:
    names = {name for name, _ in request.headers}
    if b"content-length" in names and b"transfer-encoding" in names:  # a proxy in front may see two requests in it
        return "Send either Content-Length or Transfer-Encoding."
    if not request.http_version.startswith(b"1."):
        return "This server speaks HTTP/1.1."
    return None


def _with_path(request: h11.Request) -> h11.Request:
    """A target with the server's name in it, as proxies are sent it, becomes its path; that name goes before Host."""
    match = _ABSOLUTE.fullmatch(request.target)
    if match is None:
        return request
    where, path = match.groups()
    headers = [(b"host", where), *((name, value) for name, value in request.headers if name != b"host")]
    target = path if path.startswith(b"/") else b"/" + path
    return h11.Request(method=request.method, target=target, headers=headers, http_version=request.http_version)


def _wrong_target(request: h11.Request) -> str | None:
    if not request.target.startswith(b"/") and (request.method, request.target) != (b"OPTIONS", b"*"):
        return "The target of a request is a path, such as /v1/models; this server is no proxy."
    if any(name == b"host" and host_name(value.decode("latin-1")) is None for name, value in request.headers):
        return "The Host header is not the name of a server."
    return None
