"""The nginx configuration of docs/operations.md, in front of a real server."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from tests.attack.test_framing import LENGTH, NEXT, TWO_ENDS, exchange, post, statuses
from tests.support.server import Server, chat_body, wait_for

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
pytestmark = pytest.mark.skipif(not Path(NGINX).exists(), reason="nginx is not installed here")
AROUND = """
daemon off;
worker_processes 1;
pid %(folder)s/pid;
error_log %(folder)s/errors;
events { worker_connections 512; }
http {
    access_log off;
    client_body_temp_path %(folder)s/body;
    proxy_temp_path %(folder)s/proxy;
    fastcgi_temp_path %(folder)s/f;
    uwsgi_temp_path %(folder)s/u;
    scgi_temp_path %(folder)s/s;
    %(server)s
}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """With plain C++, a token takes some milliseconds."""
    with Server(env={"GPTQ_CPU_INSTRUCTION_SET": "portable"}) as running:
        yield running


@pytest.fixture(scope="module")
def proxy(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The page's configuration without TLS, between free ports."""
    folder = tmp_path_factory.mktemp("nginx")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (config,) = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(), re.S)
    config = re.sub(r".*ssl_.*\n", "", config).replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
    config = config.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    assert "ssl" not in config and "proxy_buffering off" in config
    (folder / "conf").write_text(AROUND % {"folder": folder, "server": config})
    command = [NGINX, "-p", str(folder), "-c", str(folder / "conf"), "-e", str(folder / "errors")]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def listens() -> bool:
        assert process.poll() is None, (folder / "errors").read_text()
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(listens, 10)
        front = object.__new__(Server)  # what a test needs of one
        front.port = port
        front.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)
        yield front
        front.http.close()
    finally:
        process.terminate()
        process.wait(10)


def test_a_stream_comes_token_by_token(proxy: Server) -> None:
    body = chat_body("Tell me a story.", stream=True, max_tokens=200, ignore_eos=True)
    times = []
    with proxy.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: "):
                times.append(time.monotonic())
                last = line
    assert last == "data: [DONE]" and len(times) > 100
    pauses = sum(after - before > 0.001 for before, after in pairwise(times))
    assert pauses > 20, "it came in one piece, or in few"


def test_answers_and_errors_come_through(proxy: Server, server: Server) -> None:
    assert proxy.http.get("/ready").json() == {"status": "ready"}
    count = chat_body("Count from one to ten.", max_tokens=16, temperature=0)
    for _ in range(3):  # over one kept connection
        answer = proxy.post("/v1/chat/completions", count)
        assert answer.json()["choices"] == server.post("/v1/chat/completions", count).json()["choices"]
    refused = proxy.post("/v1/chat/completions", {"messages": 1})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages"
    assert proxy.http.post("/v1/chat/completions", content=b"x" * (9 * 2**20)).status_code == 413


def test_who_leaves_the_proxy_leaves_the_server(proxy: Server, server: Server) -> None:
    server.wait_idle()
    with proxy.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True, ignore_eos=True)) as response:
        next(response.iter_lines())
        assert server.metric("vllm:num_requests_running") == 1
    server.wait_idle(5)


def test_both_see_the_same_requests(proxy: Server) -> None:
    """However a request is framed: no more answers than requests, and none behind a refusal."""
    for name, data in TWO_ENDS.items():
        found = statuses(exchange(proxy, data + NEXT, end=True))
        assert len(found) <= 2 and 400 not in found[:-1], name
    assert statuses(exchange(proxy, post(LENGTH) + NEXT)) == [200, 200]
