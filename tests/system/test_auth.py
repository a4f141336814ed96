"""Keys, strict parameters, body limits and log lines: the server with small limits."""

from __future__ import annotations

import http.client
import json
from typing import Any

import httpx

from tests.support.server import Server, chat_body, check_error

CHAT = "/v1/chat/completions"


def test_keys(strict_server: Server) -> None:
    server = strict_server
    for headers in (
        {"authorization": ""},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer first-ke"},
        {"authorization": "Basic first-key"},
        {"authorization": "first-key"},
        {"authorization": "Bearer first-key,second-key"},
        {"authorization": "Bearer first-key", "x-api-key": "second-key"},
    ):
        for path in (
            "/v1/models",
            "/metrics",
            "/version",
            "/openapi.json",
            "/tokenizer_info",
            "//v1/models",
            "/v1/%6dodels",
        ):
            response = server.http.get(path, headers=headers)
            assert response.status_code in (401, 404), (headers, path)
        # refused before the body is looked at
        check_error(server.http.post(CHAT, content=b"{", headers=headers), 401, None, "invalid_api_key")
    doubled = [("authorization", "Bearer wrong"), ("authorization", "Bearer first-key")]
    with server.http.stream("GET", f"http://127.0.0.1:{server.port}/v1/models", headers=doubled) as response:
        assert response.status_code == 401
    for headers in ({"authorization": "Bearer second-key"}, {"authorization": "bearer first-key"}):
        assert server.http.get("/v1/models", headers=headers).status_code == 200
    anonymous = {"authorization": ""}
    assert server.http.get("/health", headers=anonymous).status_code == 200
    assert server.http.get("/ready", headers=anonymous).status_code == 200
    del server.http.headers["authorization"]
    try:
        assert server.http.get("/v1/models", headers={"x-api-key": "second-key"}).status_code == 200
        for bearer, plain, status in (
            ("first-key", "first-key", 200),
            ("first-key", "sk-of-another-service", 200),
            ("sk-of-another-service", "first-key", 200),
            ("wrong", "wrong", 401),
            ("first-key", "second-key", 401),
        ):
            both = {"authorization": f"Bearer {bearer}", "x-api-key": plain}
            assert server.http.get("/v1/models", headers=both).status_code == status, both
    finally:
        server.http.headers["authorization"] = "Bearer first-key"
    assert "first-key" not in server.log() and "second-key" not in server.log()


def test_what_is_wrong_with_the_key_is_told(strict_server: Server) -> None:
    first: list[tuple[str, str]] = [("authorization", "Bearer first-key")]
    for headers, why in (
        ([], "No API key was sent"),
        ([("authorization", "")], "No API key was sent"),
        ([("authorization", "Bearer wrong")], "Incorrect API key"),
        ([("x-api-key", "wrong")], "Incorrect API key"),
        ([("authorization", "Basic first-key")], "no bearer token"),
        ([*first, ("x-api-key", "second-key")], "More than one API key"),
        (first * 2, "More than one API key"),
    ):
        answer = httpx.get(f"http://127.0.0.1:{strict_server.port}/v1/models", headers=headers, trust_env=False)
        error = check_error(answer, 401, None, "invalid_api_key")
        assert why in error["message"] and "Authorization: Bearer KEY" in error["message"], error


def test_keys_do_not_share_cached_prefixes(strict_server: Server) -> None:
    prompt = " ".join(f"item{i}" for i in range(60))
    body = chat_body(prompt, max_tokens=1)
    strict_server.post(CHAT, body)
    cached = []
    for key in ("first-key", "second-key"):
        usage = strict_server.post(CHAT, body, authorization=f"Bearer {key}").json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] > 0 and cached[1] == 0


def test_strict_params(strict_server: Server) -> None:
    check_error(strict_server.chat(frobnicate=1), 400, "frobnicate", "unknown_parameter")
    message = {"role": "user", "content": "x", "mood": "good"}
    check_error(strict_server.post(CHAT, {"messages": [message]}), 400, "messages[0].mood", "unknown_parameter")


def test_bodies_that_are_too_large(strict_server: Server) -> None:
    """A client that sends all of its body before it reads gets the answer and not a reset."""

    def endless() -> Any:
        for _ in range(200):
            yield b" " * 10_000

    headers = {"content-type": "application/json"}
    for content in (b" " * 100_001, endless()):
        response = strict_server.http.post(CHAT, content=content, headers=headers)
        check_error(response, 413, None, "request_too_large")
    for size in (100_001, 2**20, 12 * 2**20):
        connection = http.client.HTTPConnection("127.0.0.1", strict_server.port, timeout=30)
        connection.request("POST", CHAT, b" " * size, {**headers, "authorization": "Bearer first-key"})
        answer = connection.getresponse()
        assert answer.status == 413 and b"request_too_large" in answer.read()
        connection.close()
    assert strict_server.chat(max_tokens=1).status_code == 200


def test_log_lines_are_json(strict_server: Server) -> None:
    evil = "\x1b[31mred\r\nGET /fake HTTP/1.1"
    strict_server.post(CHAT, chat_body(evil, max_tokens=1))
    strict_server.http.get("/v1/models/%1b%5b31m%0d%0afake")
    for line in strict_server.log().splitlines():
        assert json.loads(line)["event"]
        assert "\x1b" not in line and len(line) < 1000
