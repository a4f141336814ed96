"""The HTTP edge: slow, dead, huge and malformed clients, and the schema's bounds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gptq_api.api.app import ROUTERS
from gptq_api.api.routes.guard import GuardedRoute, PublicRoute
from tests.support.server import Server, chat_body, chunks, raw_request


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def read_all(sock: socket.socket) -> bytes:
    data = b""
    try:
        while part := sock.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


@pytest.mark.alone
def test_slow_headers_and_bodies_are_cut(strict_server: Server) -> None:
    """Nothing, half a header, a byte at a time, a body that never ends: closed after the deadline as a whole."""
    half = raw_request("/v1/chat/completions", b"{" * 50, "Authorization: Bearer first-key")
    socks = [connect(strict_server) for _ in range(4)]
    starts = [b"", b"POST /v1/chat/comp", half[:40], half[:-10]]
    started = time.monotonic()
    for sock, start in zip(socks, starts, strict=True):
        sock.sendall(start)
    dripping = connect(strict_server)
    for byte in b"GET /health HTTP/1.1\r\nX-A: " + b"a" * 100:
        try:
            dripping.sendall(bytes([byte]))
        except (BrokenPipeError, ConnectionResetError):
            break
        time.sleep(0.02)
    assert time.monotonic() - started < 2
    for sock, start in zip([*socks, dripping], [*starts, b"drip"], strict=True):
        data = read_all(sock)
        assert data.startswith(b"HTTP/1.1 408 ") or sock is dripping, (start, data)
        sock.close()
    assert time.monotonic() - started < 3
    assert strict_server.chat(max_tokens=1).status_code == 200


@pytest.mark.alone
def test_a_kept_alive_connection_has_the_deadlines_too(strict_server: Server) -> None:
    with connect(strict_server) as sock:
        sock.sendall(raw_request("/health", b"", method="GET"))
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        sock.sendall(b"GET /hea")
        started = time.monotonic()
        assert b"408" in read_all(sock)
        assert time.monotonic() - started < 2.5


@pytest.mark.alone
def test_pings_and_slow_models_are_no_deadline(strict_server: Server) -> None:
    """A request whose answer takes longer than every client deadline is nobody's fault; comments keep it alive."""
    body = chat_body(max_tokens=200, stream=True, ignore_eos=True, n=2)
    with strict_server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        pieces = response.iter_raw()
        text = next(pieces)
        os.kill(strict_server.engine_pid, signal.SIGSTOP)
        started = time.monotonic()
        try:
            while time.monotonic() - started < 1.5:  # every deadline is one second
                text += next(pieces)
        finally:
            os.kill(strict_server.engine_pid, signal.SIGCONT)
        text += b"".join(pieces)
    assert text.endswith(b"data: [DONE]\n\n") and b"\r" not in text
    assert text.count(b": ping\n\n") >= 5


def test_header_bombs(server: Server) -> None:
    memory = resident(server.process.pid)
    for bomb in (b"X-A: " + b"a" * 10_000_000, b"".join(b"X-%d: a\r\n" % i for i in range(200_000)), b""):
        with connect(server) as sock:
            path = b"/" + b"a" * 65536 if not bomb else b"/health"
            try:
                sock.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n" + bomb + b"\r\n\r\n")
                data = read_all(sock)
            except (BrokenPipeError, ConnectionResetError):
                continue
            assert data == b"" or data.startswith(b"HTTP/1.1 400 "), data[:200]
    assert resident(server.process.pid) - memory < 4 * 2**20
    assert server.http.get("/health").status_code == 200


def resident(pid: int) -> int:
    """bytes"""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_malformed_http_gets_openais_error_object(server: Server) -> None:
    both = raw_request("/tokenize", b"0\r\n\r\n", "Transfer-Encoding: chunked")
    for junk in (
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"GET /x y HTTP/1.1\r\n\r\n",
    ):
        with connect(server) as sock:
            sock.sendall(junk + b"\r\n\r\n")
            data = read_all(sock)
            assert data.startswith(b"HTTP/1.1 400 ") and b'{"error":{' in data, junk
    with connect(server) as sock:
        sock.sendall(both)
        assert read_all_until(sock, b"}}").startswith(b"HTTP/1.1 400 ")


def read_all_until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data and (part := sock.recv(4096)):
        data += part
    return data


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    with connect(server) as sock:
        sock.sendall(raw_request("/version", b"", method="GET") + raw_request("/v1/models", b"", method="GET"))
        data = read_all_until(sock, b'"object":"list"')
    assert data.index(b'"version"') < data.index(b'"object":"list"')


def test_a_body_of_two_lengths_is_refused_whoever_sends_it(server: Server, strict_server: Server) -> None:
    """One answer and the end of the connection: what a proxy may take for the next request is not looked at."""
    body = b"0\r\n\r\n"
    following = raw_request("/version", b"", "Authorization: Bearer first-key", method="GET")
    for method, path in (("GET", "/health"), ("GET", "/nope"), ("PUT", "/v1/models"), ("POST", "/tokenize")):
        for running, headers in (
            (server, []),
            (strict_server, []),
            (strict_server, ["Authorization: Bearer first-key"]),
        ):
            request = raw_request(path, body, "Transfer-Encoding: chunked", *headers, method=method)
            with connect(running) as sock:
                sock.sendall(request + following)
                data = read_all(sock)
            assert data.startswith(b"HTTP/1.1 400 ") and b"\r\nconnection: close\r\n" in data.lower(), (path, data)
            assert b"Send either Content-Length or Transfer-Encoding." in data, (path, data)
            assert data.count(b"HTTP/1.1 ") == 1, (path, data)


ENDLESS = b"Transfer-Encoding: chunked\r\n\r\n"
"""the end of the headers of a request whose body never ends; the body consists of"""
TINY_CHUNKS = b"1\r\nx\r\n" * 10_000


def head(path: str, *extra: bytes, method: str = "POST") -> bytes:
    return b"\r\n".join([f"{method} {path} HTTP/1.1".encode(), b"Host: localhost", *extra, ENDLESS])


@pytest.mark.alone
@pytest.mark.parametrize("flags", [(), ("--api-key", "key")])
def test_tiny_chunks_do_not_stop_the_event_loop(flags: tuple[str, ...]) -> None:
    """A body of one-byte chunks, as fast as it is taken, where it is read and where the key is missing: with one sender
    and with four, /health takes 7 ms on two cores; parsed as it arrives, 0.5 and 2.8 s."""
    with Server(*flags) as server:  # of its own: it works for a while on what the senders leave in the kernel
        for num_senders in (1, 4):
            assert statistics.median(health_beside_tiny_chunks(server, num_senders)) < 0.4


def health_beside_tiny_chunks(server: Server, num_senders: int) -> list[float]:
    """seconds of each of 40 requests, or of fewer where those take too long"""
    left = threading.Event()

    def send() -> None:
        while not left.is_set():
            with connect(server) as sock, contextlib.suppress(OSError):
                sock.sendall(head("/v1/chat/completions", b"Content-Type: application/json"))
                while not left.is_set():
                    sock.send(TINY_CHUNKS)

    senders = [threading.Thread(target=send) for _ in range(num_senders)]
    for sender in senders:
        sender.start()
    try:
        time.sleep(0.5)
        seconds: list[float] = []
        while len(seconds) < 40 and sum(seconds) < 16:
            started = time.monotonic()
            assert server.http.get("/health").status_code == 200
            seconds.append(time.monotonic() - started)
    finally:
        left.set()
        for sender in senders:
            sender.join()
    return seconds


def test_an_answer_before_the_end_of_the_body_closes_the_connection(server: Server, strict_server: Server) -> None:
    """The answer says so, arrives although the client goes on sending, and is followed by the end, soon."""
    json_type, key = b"Content-Type: application/json", b"Authorization: Bearer first-key"
    for running, status, request in (
        (server, 200, head("/health", method="GET")),
        (server, 404, head("/nope")),
        (server, 405, head("/v1/models", method="PUT")),
        (server, 400, head("/tokenize", b"Content-Type: text/plain")),
        (server, 415, head("/tokenize", json_type, b"Content-Encoding: gzip")),
        (strict_server, 401, head("/tokenize", json_type)),
        (strict_server, 401, head("/tokenize", json_type, b"Expect: 100-continue")),
        (strict_server, 413, head("/tokenize", json_type, key)),
    ):
        with connect(running) as sock:
            sock.sendall(request)
            for _ in range(40):  # 2.4 MB; no reset until then, or this would raise
                sock.sendall(TINY_CHUNKS)
            data = read_all(sock)
            ended = time.monotonic()
            assert data.startswith(b"HTTP/1.1 %d " % status), (status, data)
            assert b"\r\nconnection: close\r\n" in data.lower(), (status, data)
            assert data.count(b"HTTP/1.1 ") == 1, data
            with pytest.raises(OSError):
                while time.monotonic() - ended < 8:
                    sock.sendall(TINY_CHUNKS)


def test_what_waits_for_us_is_no_fault_of_the_client(strict_server: Server) -> None:
    """Bodies whose parsing takes longer than the deadline, from clients that sent them at once."""
    body = json.dumps(chat_body(max_tokens=1)).encode()
    body += b" " * (99_000 - len(body))
    chunked = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    request = head("/v1/chat/completions", b"Content-Type: application/json", b"Authorization: Bearer first-key")
    socks = [connect(strict_server) for _ in range(3)]  # as many as one of two keys may hold of four places
    senders = [threading.Thread(target=sock.sendall, args=(request + chunked,)) for sock in socks]
    for sender in senders:
        sender.start()
    for sock in socks:
        sock.settimeout(60)
        assert read_all_until(sock, b"}}").startswith(b"HTTP/1.1 200 ")
        sock.close()
    for sender in senders:
        sender.join()


def test_a_stream_to_a_client_that_knows_no_chunks(server: Server) -> None:
    body = chat_body("Hello", max_tokens=3, ignore_eos=True, stream=True)
    request = raw_request("/v1/chat/completions", json.dumps(body).encode()).replace(b" HTTP/1.1", b" HTTP/1.0", 1)
    with connect(server) as sock:
        sock.sendall(request)
        head, _, data = read_all(sock).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower() and b"\r" not in data
    events = data.removesuffix(b"\n\n").split(b"\n\n")
    assert len(chunks(events)) >= 3


def test_dead_peers_are_noticed_by_the_kernel(server: Server) -> None:
    """Keep-alive probes are on for accepted connections (`timer:(keepalive` where ss can show it)."""
    with connect(server) as sock:
        sock.sendall(raw_request("/health", b"", method="GET"))
        sock.recv(4096)
        local = f"{sock.getsockname()[1]:04X}"
        # /proc/net/tcp: remote port is ours, timer field 02 is keep-alive
        lines = Path("/proc/net/tcp").read_text().splitlines()
        timers = [line.split()[5] for line in lines[1:] if line.split()[2].endswith(f":{local}")]
    assert timers and all(timer.startswith("02") for timer in timers)


def test_an_idle_server_uses_no_cpu(server: Server) -> None:
    server.wait_idle()

    def ticks() -> int:
        pids = (server.process.pid, server.engine_pid)
        fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in pids]
        return sum(int(field[11]) + int(field[12]) for field in fields)

    time.sleep(0.3)
    before, switches = ticks(), wakeups(server.process.pid)
    time.sleep(1)
    assert ticks() - before <= 1, "hundredths of a second of both processes"
    assert wakeups(server.process.pid) - switches <= 5, "nothing polls"


def wakeups(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.M)[1])  # type: ignore[index]


def test_every_field_of_the_schema_is_bounded(server: Server) -> None:
    document = server.http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"} <= document["paths"].keys()
    schemas = document["components"]["schemas"]
    bodies = [
        operation["requestBody"]["content"]["application/json"]["schema"]
        for operations in document["paths"].values()
        for operation in operations.values()
        if "requestBody" in operation
    ]
    parameters = [
        parameter["schema"]
        for operations in document["paths"].values()
        for operation in operations.values()
        for parameter in operation.get("parameters", [])
    ]
    assert len(bodies) >= 4
    assert unbounded({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "number"}}]}, schemas, "x")
    for schema in bodies + parameters:
        assert unbounded(schema, schemas, "") == []


def unbounded(schema: dict[str, Any], schemas: dict[str, Any], path: str) -> list[str]:
    """Names of what has no smallest or largest value in a JSON schema."""
    if "$ref" in schema:
        return unbounded(schemas[schema["$ref"].rsplit("/", 1)[1]], schemas, path)
    found = [bad for option in schema.get("anyOf", []) for bad in unbounded(option, schemas, path)]
    kind = schema.get("type")
    if kind == "string" and not ({"maxLength", "enum", "const"} & schema.keys()):
        found.append(f"{path}: a string without maxLength")
    if kind in ("integer", "number"):
        low = {"minimum", "exclusiveMinimum"} & schema.keys()
        high = {"maximum", "exclusiveMaximum"} & schema.keys()
        found += [] if low and high else [f"{path}: a number without bounds"]
    if kind == "array":
        found += [] if "maxItems" in schema else [f"{path}: an array without maxItems"]
        found += unbounded(schema.get("items", {}), schemas, f"{path}[]")
    if kind == "object":
        for name, value in schema.get("properties", {}).items():
            found += unbounded(value, schemas, f"{path}.{name}")
        if isinstance(extra := schema.get("additionalProperties"), dict):
            found += [] if "maxProperties" in schema else [f"{path}: an object without maxProperties"]
            found += unbounded(extra, schemas, f"{path}.*")
    return found


def test_every_route_is_guarded_or_one_that_tells_nothing() -> None:
    routes = [route for router in ROUTERS for route in router.routes]
    public = {route.path for route in routes if type(route) is PublicRoute}
    assert public == {"/health", "/ready", "/docs", "/"}
    assert all(isinstance(route, PublicRoute | GuardedRoute) for route in routes)
    assert len(routes) >= 12


def test_the_api_process_never_imports_torch() -> None:
    code = (
        "import sys, gptq_api.api.listener, gptq_api.api.server\n"
        "bad = {'torch', 'transformers', 'pickle'} & set(sys.modules)\n"
        "assert not bad - {'pickle'}, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    package = Path(__file__).parents[2] / "gptq_api"
    sources = [*package.joinpath("api").rglob("*.py"), *package.joinpath("edge").rglob("*.py")]
    assert not [
        path for path in sources if re.search(r"^\s*(import|from) (pickle|torch|transformers)", path.read_text(), re.M)
    ]


def test_no_middleware_that_hides_disconnects() -> None:
    package = Path(__file__).parents[2] / "gptq_api"
    sources = [*package.joinpath("api").rglob("*.py"), *package.joinpath("edge").rglob("*.py")]
    for path in sources:
        assert not re.search(r"import .*BaseHTTPMiddleware|\.middleware\(", path.read_text()), path
