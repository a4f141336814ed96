"""The port is open while the model loads: who asks is told so, and a model that cannot be loaded is still one sentence
and exit status 1."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from gptq_api.demo import DEMO_PATH
from tests.support.loading import LoadingServer
from tests.support.server import chat_body, check_error

HTML = {"accept": "text/html"}


@pytest.fixture
def loading(tmp_path: Path) -> Iterator[LoadingServer]:
    with LoadingServer(tmp_path) as server:
        yield server


def test_who_asks_is_told_and_everything_is_there_when_it_is_loaded(loading: LoadingServer) -> None:
    http = loading.http
    for method in ("GET", "HEAD"):
        for path in ("/health", "/ready"):
            answer = http.request(method, path)
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            assert method == "HEAD" or answer.json() == {"status": "engine loading"}
    for path in ("/v1/models", "/metrics", "/openapi.json", "/server_info", "/nothing"):
        check_error(http.get(path), 503, None, "engine_loading")
    for path in ("/v1/chat/completions", "/v1/responses"):
        answer = http.post(path, json=chat_body())
        check_error(answer, 503, None, "engine_loading")
        assert int(answer.headers["retry-after"]) >= 1
    told = http.post("/v1/messages", json=chat_body())
    assert told.status_code >= 500 and told.json()["type"] == "error"
    page = http.get("/", headers=HTML)
    assert page.status_code == 200 and "<textarea" in page.text
    assert http.get("/docs", headers=HTML).status_code == 200
    check_error(http.get("/", headers={**HTML, "host": "evil.example"}), 403)
    assert "serving" not in loading.log()
    loading.go()
    loading.wait_ready()
    assert http.get("/ready").json() == {"status": "ready"}
    assert loading.chat(max_tokens=2).status_code == 200
    assert loading.log().count("serving demo at") == 1 and "Traceback" not in loading.log()


def test_a_client_that_asks_early_is_answered(loading: LoadingServer) -> None:
    """OpenAI's, by its own retries."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{loading.port}/v1", api_key="none", max_retries=20)
    threading.Timer(1, loading.go).start()
    answer = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "Hello"}], max_tokens=4)
    assert answer.usage is not None and answer.usage.completion_tokens == 4
    assert "status=503" in loading.log()


def test_a_signal_ends_it_with_somebody_connected(loading: LoadingServer) -> None:
    with socket.create_connection(("127.0.0.1", loading.port)) as idle:
        loading.signal(signal.SIGTERM)
        assert loading.wait(5) == 0
        idle.settimeout(5)
        assert idle.recv(100) == b""
    assert "stopped while loading" in loading.log() and "Traceback" not in loading.log()


def test_a_model_that_cannot_be_loaded_is_one_sentence_and_status_1(tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(DEMO_PATH, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with LoadingServer(tmp_path, "--model-path", str(folder)) as server:
        assert server.http.get("/ready").json() == {"status": "engine loading"}
        assert server.http.get("/", headers=HTML).status_code == 200
        server.go()
        assert server.wait(30) == 1
        sentences = [line for line in server.log().splitlines() if line.startswith("gptq-api serve: ")]
        assert len(sentences) == 1 and str(tmp_path) in sentences[0]
        assert not any(word in server.log() for word in ("Traceback", "never retrieved", "serving"))
        with pytest.raises(httpx.TransportError):
            server.http.get("/ready")


def test_a_port_that_another_server_took_meanwhile_is_one_sentence(tmp_path: Path) -> None:
    """Both are bound, and one listens first."""
    with LoadingServer(tmp_path) as first:
        done = first.run_beside("serve", "--port", str(first.port))
        assert done.returncode == 1
        assert [line for line in done.stderr.splitlines() if f"port {first.port} on 127.0.0.1 is in use" in line]
        first.go()
        first.wait_ready()


def test_keys_and_pages_that_are_left_out(tmp_path: Path) -> None:
    with LoadingServer(tmp_path, "--api-key", "key", "--no-web-page", "--log-json") as server:
        assert server.http.get("/", headers=HTML).status_code == 404
        check_error(server.http.get("/v1/models"), 503, None, "engine_loading")
        server.go()
        server.wait_ready()
        check_error(server.http.get("/v1/models"), 401)
        lines = [json.loads(line) for line in server.log().splitlines()]
        assert any(line["event"] == "GET /v1/models" and line.get("error") == "engine_loading" for line in lines)
