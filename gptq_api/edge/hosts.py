"""Whom a server without keys answers: whoever reached it by a name that is its own.

A web page whose domain its owner points at 127.0.0.1 is of the same origin as a server there, for the browser that
shows it (DNS rebinding): it may read every answer, and no rule of CORS applies. What gives it away is the name in Host.
That is a name and never an address, so a server that listens for other machines answers to every address. Pages that
are foreign for the browser as well may not read answers; what they send without asking is refused by its Origin.

Pure ASGI, inside the request log and outside of everything else, so that no path is left out.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gptq_api.edge.cors import ANY, send_error
from gptq_api.edge.errors import ErrorBody

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]{0,5})?")
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
"""methods that change nothing"""


def host_name(host: str) -> str | None:
    """A Host header without its port: lower case, an IPv6 address without brackets; None where it is none."""
    match = _HOST.fullmatch(host.strip())
    return None if match is None else match[1].lower().removeprefix("[").removesuffix("]").removesuffix(".")


def is_loopback(name: str) -> bool:
    """Whether it names this machine wherever it is looked up."""
    address = _address(name)
    if address is None:
        return name == "localhost" or name.endswith(".localhost")
    return address.is_loopback


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


class HostMiddleware:
    """For a server without keys. `host`: where it listens; `allowed`: more names, `*.example.com` for all below one, *
    for any; `origins`: those of CORS."""

    def __init__(
        self, app: ASGIApp, host: str, allowed: Iterable[str], origins: Iterable[str], error_body: ErrorBody
    ) -> None:
        self.app = app
        self._names = {host.lower(), *allowed}
        self._any_address = not is_loopback(host.lower())
        self._origins = frozenset(origins)
        self._error_body = error_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (why := self._refusal(scope["method"], Headers(scope=scope))):
            return await send_error(send, 403, self._error_body(403, why))
        return await self.app(scope, receive, send)

    def _refusal(self, method: str, headers: Headers) -> str | None:
        host = headers.get("host")  # HTTP/1.0 knows none, and no browser speaks it
        if host is not None and not self._is_ours(host_name(host)):
            return (
                f"This server has no API key and answers to its own names only, which '{host[:100]}' is not: "
                "see --allowed-host, or set --api-key."
            )
        origin = headers.get("origin")
        if origin is not None and method not in _SAFE and not self._may_send(origin.lower(), host):
            return f"Pages of {origin[:100]} may not use this server: see --cors-origin, or set --api-key."
        return None

    def _is_ours(self, name: str | None) -> bool:
        if not name:
            return False
        if is_loopback(name) or name in self._names or ANY in self._names:
            return True
        if _address(name) is not None:
            return self._any_address
        return any(f"*.{name[at + 1 :]}" in self._names for at, letter in enumerate(name) if letter == ".")

    def _may_send(self, origin: str, host: str | None) -> bool:
        """Whether a page is ours, another program's of this machine, or allowed."""
        if ANY in self._origins or origin in self._origins:
            return True
        _, _, where = origin.partition("://")
        return bool(where) and (where == (host or "").lower() or is_loopback(host_name(where) or ""))
