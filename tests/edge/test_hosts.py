"""Which Host and Origin headers a server without keys answers to."""

from __future__ import annotations

from typing import Any

import pytest

from gptq_api.config import Settings
from gptq_api.edge.hosts import HostMiddleware, host_name, is_loopback
from gptq_api.errors import ConfigError
from gptq_api.settings_source import load_settings

PAGE = "https://app.example.com"


async def status(method: str, headers: dict[str, str], *, host: str = "127.0.0.1", **lists: list[str]) -> int:
    """200 where the application behind the middleware is asked."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    stack = HostMiddleware(
        app, host, lists.get("allowed", []), lists.get("origins", []), lambda status, message: message.encode()
    )
    await stack({"type": "http", "method": method, "headers": raw}, None, send)  # type: ignore[arg-type]
    if sent[0]["status"] == 403:
        assert b"--allowed-host" in sent[1]["body"] or b"--cors-origin" in sent[1]["body"]
    return int(sent[0]["status"])


LOOPBACK = ["localhost", "LOCALHOST:8000", "a.localhost:1", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "localhost."]
NAMES = ["evil.example", "evil.example:8000", "localhost.evil.example", "notlocalhost", "127.0.0.1.evil.example"]
ADDRESSES = ["192.168.1.5:8000", "10.0.0.1", "[fe80::1]:8000", "0.0.0.0:8000", "8.8.8.8"]
NONSENSE = ["", "localhost/evil", "evil@localhost", "localhost evil", "[::1", "::1", "127.1", "0x7f.1", "[v1.x]", "é"]


async def test_loopback_names_and_no_others() -> None:
    for host in LOOPBACK:
        assert await status("GET", {"host": host}) == 200, host
    for host in (*NAMES, *ADDRESSES, *NONSENSE):
        assert await status("GET", {"host": host}) == 403, host
    assert await status("GET", {}) == 200, "HTTP/1.0"


async def test_the_address_or_name_it_was_told_to_listen_on() -> None:
    for own, host in (("box.lan", "BOX.lan:8000"), ("192.168.1.5", "192.168.1.5"), ("fe80::2", "[fe80::2]:1")):
        assert await status("GET", {"host": host}, host=own) == 200
        assert await status("GET", {"host": "evil.example"}, host=own) == 403
    for host in ADDRESSES:
        assert await status("GET", {"host": host}, host="0.0.0.0") == 200, "an address is never a rebound name"
    for host in (*NAMES, *NONSENSE):
        assert await status("GET", {"host": host}, host="0.0.0.0") == 403, host


async def test_names_that_are_allowed() -> None:
    allowed = ["models.example.com", "*.internal"]
    for host in ("models.example.com", "Models.Example.com:80", "a.internal", "a.b.internal:9"):
        assert await status("GET", {"host": host}, allowed=allowed) == 200, host
    for host in ("example.com", "x.models.example.com", "internal", "a.internal.evil", "1.2.3.4"):
        assert await status("GET", {"host": host}, allowed=allowed) == 403, host
    for host in (*NAMES, *ADDRESSES):
        assert await status("GET", {"host": host}, allowed=["*"]) == 200, host
    assert await status("GET", {"host": "local host"}, allowed=["*"]) == 403


async def test_foreign_pages_may_not_send() -> None:
    here = {"host": "localhost:8000"}
    for origin in (PAGE, "null", "http://localhost.evil.example", "https://evil.example", "file://", ""):
        assert await status("POST", {**here, "origin": origin}) == 403, origin
        assert await status("GET", {**here, "origin": origin}) == 200, "whose answer it cannot read"
        assert await status("OPTIONS", {**here, "origin": origin}) == 200, "answered by CORS"
        assert await status("POST", {**here, "origin": origin}, origins=["*"]) == 200
    for origin in ("http://localhost:8000", "http://localhost:3000", "http://127.0.0.1:8000", "http://[::1]:5173"):
        assert await status("POST", {**here, "origin": origin}) == 200, origin
    assert await status("POST", {**here, "origin": PAGE}, origins=[PAGE]) == 200
    assert await status("POST", {**here, "origin": "null"}, origins=["null"]) == 200
    own = {"host": "192.168.1.5:8000", "origin": "http://192.168.1.5:8000"}
    assert await status("POST", own, host="0.0.0.0") == 200
    assert await status("POST", {**own, "origin": "http://6.6.6.6"}, host="0.0.0.0") == 403


def test_names_of_hosts() -> None:
    assert host_name("[2001:DB8::1]:80") == "2001:db8::1" and host_name("A.b.:8") == "a.b" and host_name("a:b") is None
    assert is_loopback("::1") and is_loopback("127.255.0.1") and not is_loopback("128.0.0.1")


@pytest.mark.parametrize("name", ["example.com:8000", "https://example.com", "a b", "*.*", "a..b", "*example.com"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-host: is a name as it stands in a URL"):
        load_settings(Settings, ["--allowed-host", name])
