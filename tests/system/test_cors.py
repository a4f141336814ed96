"""Browsers: which pages may ask, and what they may read."""

from __future__ import annotations

import pytest

from gptq_api.config import Settings
from gptq_api.errors import ConfigError
from gptq_api.settings_source import load_settings
from tests.support.server import Server, chat_body, check_error

CHAT, PAGE = "/v1/chat/completions", "https://app.example.com"
ASKS = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}


def test_pages_of_the_origins_that_are_named() -> None:
    with Server(
        "--cors-origin", f"{PAGE},http://localhost:3000", "--cors-origin", "null", "--api-key", "key"
    ) as server:
        for origin in (PAGE, "http://localhost:3000", "null"):
            asked = server.http.options(CHAT, headers={"origin": origin, **ASKS})
            assert asked.status_code == 204 and asked.content == b""
            assert asked.headers["access-control-allow-origin"] == origin and asked.headers["vary"] == "origin"
            assert asked.headers["access-control-allow-headers"] == ASKS["access-control-request-headers"]
            assert "POST" in asked.headers["access-control-allow-methods"]
            assert "access-control-allow-credentials" not in asked.headers
        key = {"authorization": "Bearer key", "origin": PAGE}
        for answer, status in (
            (server.http.post(CHAT, json=chat_body(max_tokens=2), headers=key), 200),
            (server.http.post(CHAT, json=chat_body(max_tokens=2, stream=True), headers=key), 200),
            (server.http.post(CHAT, json={}, headers=key), 400),
            (server.http.post(CHAT, json=chat_body(), headers={"origin": PAGE}), 401),
            (server.http.get("/nope", headers=key), 404),
        ):
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == PAGE
            exposed = answer.headers["access-control-expose-headers"].split(", ")
            assert {"x-request-id", "retry-after", "x-unsupported-params"} <= set(exposed)
        for origin in ("https://evil.example.com", f"{PAGE}.evil.com", "http://app.example.com"):
            refused = server.http.options(CHAT, headers={"origin": origin, **ASKS})
            assert "--cors-origin" in check_error(refused, 403)["message"]
            other = server.http.get("/v1/models", headers={**key, "origin": origin})
            assert other.status_code == 200 and other.headers["vary"] == "origin"
            assert not [name for name in (*refused.headers, *other.headers) if name.startswith("access-control")]
        assert server.http.get("/health").headers["vary"] == "origin", "a cache keeps the answers apart"
        odd = {**ASKS, "access-control-request-headers": "a b; c"}
        asked = server.http.options(CHAT, headers={"origin": PAGE, **odd})
        assert asked.status_code == 204 and "access-control-allow-headers" not in asked.headers
        assert "warning" not in server.log()


def test_every_page_with_a_warning_where_there_is_no_key() -> None:
    with Server("--cors-origin", "*") as server:
        asked = server.http.options(CHAT, headers={"origin": PAGE, **ASKS})
        assert asked.status_code == 204 and asked.headers["access-control-allow-origin"] == "*"
        answer = server.http.post(CHAT, json=chat_body(max_tokens=1), headers={"origin": PAGE})
        assert answer.headers["access-control-allow-origin"] == "*" and "vary" not in answer.headers
        assert "--cors-origin * without --api-key" in server.log()


def test_off_by_default(server: Server) -> None:
    check_error(server.http.options(CHAT, headers={"origin": PAGE, **ASKS}), 405, None, "method_not_allowed")
    answer = server.http.get("/v1/models", headers={"origin": PAGE})
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origin", ["example.com", "https://example.com/", "https://a b", "https://", "*.example.com"])
def test_what_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="--cors-origin: is an origin as browsers send it"):
        load_settings(Settings, ["--cors-origin", origin])
    assert load_settings(Settings, ["--cors-origin", "HTTPS://Example.com:8443"]).cors_origin == [
        "https://example.com:8443"
    ]
