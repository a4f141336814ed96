"""DNS rebinding against a real server: every path is answered to its own names only, where there is no key."""

from __future__ import annotations

from tests.support.server import Server, chat_body, check_error

PATHS = ("/health", "/ready", "/metrics", "/docs", "/openapi.json", "/v1/models", "/nope", "/version")


def test_a_server_without_keys_answers_to_its_own_names(server: Server) -> None:
    evil = {"host": f"evil.example:{server.port}"}
    for path in PATHS:
        for method in ("GET", "HEAD", "OPTIONS", "PUT", "POST"):
            answer = server.http.request(method, path, headers=evil)
            assert answer.status_code == 403, (method, path)
        message = check_error(server.http.get(path, headers=evil), 403)["message"]
        assert "evil.example" in message and "--allowed-host" in message
    check_error(server.http.post("/v1/chat/completions", json=chat_body(max_tokens=1), headers=evil), 403)
    for host in ("localhost", f"LocalHost:{server.port}", "127.0.0.1", f"[::1]:{server.port}"):
        assert server.http.get("/health", headers={"host": host}).status_code == 200, host
    page = {"origin": "https://evil.example"}
    refused = server.http.post("/v1/chat/completions", json=chat_body(max_tokens=1), headers=page)
    assert "--cors-origin" in check_error(refused, 403)["message"]
    own = {"origin": f"http://127.0.0.1:{server.port}"}
    answered = server.http.post("/v1/chat/completions", json=chat_body(max_tokens=1), headers=own)
    assert answered.status_code == 200, "our own page at /docs"


def test_a_key_is_proof_enough(strict_server: Server) -> None:
    for headers in ({"host": "models.example.com"}, {"origin": "https://app.example.com"}):
        assert strict_server.http.get("/v1/models", headers=headers).status_code == 200
        answer = strict_server.http.post("/v1/chat/completions", json=chat_body(max_tokens=1), headers=headers)
        assert answer.status_code == 200


def test_a_server_for_others_without_keys_has_addresses_and_the_names_it_is_given() -> None:
    with Server("--host", "0.0.0.0", "--allow-unauthenticated", "--allowed-host", "gpu-box,*.internal") as server:
        for host, status in (
            ("192.168.1.5:8000", 200),
            ("localhost", 200),
            ("gpu-box:8000", 200),
            ("a.internal", 200),
            ("evil.example", 403),
        ):
            for path in ("/health", "/v1/models"):
                assert server.http.get(path, headers={"host": host}).status_code == status, host
