"""Where a request ends and where it is meant to go, as RFC 9110 and 9112 have it, over bare sockets."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.server import Server, chat_body, chunks, raw_request, wait_for

GET_MODELS = raw_request("/v1/models", b"", method="GET")
CHAT = "/v1/chat/completions"


def send(server: Server, data: bytes, *, then_end: bool = False) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    sock.sendall(data)
    if then_end:
        sock.shutdown(socket.SHUT_WR)
    return sock


def answers(sock: socket.socket) -> list[tuple[int, bytes]]:
    """Status and body of all that comes until the connection ends, interim answers left out."""
    data = b""
    with sock:
        while part := sock.recv(65536):
            data += part
    return [answer for answer in split(data) if answer[0] >= 200]


def split(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if b"transfer-encoding: chunked" in head.lower():
            body = b""
            while True:
                size, _, data = data.partition(b"\r\n")
                body, data = body + data[: int(size, 16)], data[int(size, 16) + 2 :]
                if not int(size, 16):
                    break
        else:
            body, data = (data[: int(length[1])], data[int(length[1]) :]) if length else (b"", data)
        yield status, body


def ask(body: dict[str, Any]) -> bytes:
    return raw_request(CHAT, json.dumps(body).encode())


def test_a_client_that_sends_no_more_gets_its_answers(server: Server) -> None:
    long = chat_body(max_tokens=60, ignore_eos=True, temperature=0)
    expected = server.post(CHAT, long).json()["choices"]
    before = server.metric("gptq_api:requests_cancelled_total", cause="disconnect")
    for data, statuses in (
        (GET_MODELS, [200]),
        (GET_MODELS.replace(b"HTTP/1.1", b"HTTP/1.0"), [200]),
        (ask(long), [200]),
        (GET_MODELS + ask(long) + GET_MODELS + ask(long), [200] * 4),
        (raw_request("/nope", b"x" * 100_000), [404]),
        (raw_request("/tokenize", json.dumps({"prompt": "a"}).encode() + b" " * 200_000), [200]),
    ):
        found = answers(send(server, data, then_end=True))
        assert [status for status, _ in found] == statuses
        for _, body in found:
            if b"chat.completion" in body:
                assert json.loads(body)["choices"] == expected
    ((status, body),) = answers(send(server, ask({**long, "stream": True}), then_end=True))
    events = [event for event in body.split(b"\n\n") if event and not event.startswith(b":")]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks(events))
    assert status == 200 and text == expected[0]["message"]["content"]
    assert server.metric("gptq_api:requests_cancelled_total", cause="disconnect") == before


def test_a_client_that_waits_in_the_queue_may_send_no_more(server: Server) -> None:
    """Here nothing is written to it for a while, which is how one that has gone is known."""
    endless = chat_body(ignore_eos=True, max_tokens=900)
    with Server("--max-num-seqs", "1") as single:
        first = send(single, ask({**endless, "stream": True}))
        waiting = [send(single, ask(chat_body(max_tokens=3, stream=on)), then_end=True) for on in (True, False)]
        gone = [send(single, ask(chat_body(max_tokens=3, stream=on))) for on in (True, False)]
        wait_for(lambda: single.metric("vllm:num_requests_waiting") == 4, 10)
        for sock in gone:
            sock.close()
        wait_for(lambda: single.metric("vllm:num_requests_waiting") == 2, 10)
        first.close()
        streamed, whole = [answers(sock) for sock in waiting]
        assert [(len(found), found[0][0]) for found in (streamed, whole)] == [(1, 200)] * 2
        assert streamed[0][1].endswith(b"data: [DONE]\n\n") and b"usage" in whole[0][1]
        single.wait_idle()
        assert "Traceback" not in single.log()


@pytest.mark.alone
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_gone_is_noticed(server: Server, stream: bool) -> None:
    before = server.metric("gptq_api:requests_cancelled_total", cause="disconnect")
    sock = send(server, ask(chat_body(ignore_eos=True, max_tokens=900, stream=stream)))
    wait_for(lambda: server.metric("vllm:num_requests_running") == 1, 10)
    sock.close()
    started = time.monotonic()
    wait_for(lambda: server.metric("vllm:num_requests_running") == 0, 10)
    assert time.monotonic() - started < 1
    wait_for(lambda: server.metric("gptq_api:requests_cancelled_total", cause="disconnect") == before + 1, 5)


@pytest.mark.alone
def test_half_a_request_and_no_more_is_the_end(server: Server) -> None:
    body = ask(chat_body())
    for data in (b"", b"GET /v1/mod", body[:-5], body[:60], GET_MODELS.replace(b"Length: 0", b"Length: 5")):
        sock = send(server, data, then_end=True)
        started = time.monotonic()
        found = answers(sock)
        assert [status for status, _ in found] in ([], [200]) and time.monotonic() - started < 3


def test_targets_with_the_name_of_a_server(server: Server) -> None:
    """As to a proxy: the path counts, and the name goes before that in Host."""
    for target, host, status in (
        (f"http://localhost:{server.port}/v1/models?x=1", "localhost", 200),
        ("HTTP://LOCALHOST/v1/models", "evil.example", 200),
        ("https://localhost/v1/models", "localhost", 200),
        ("http://evil.example/v1/models", "localhost", 403),
        ("http://localhost", "localhost", 200),
        ("http://localhost?x", "localhost", 200),
        ("http://localhost/none", "localhost", 404),
        ("http://user@localhost/v1/models", "localhost", 400),
        ("ftp://localhost/v1/models", "localhost", 400),
        ("v1/models", "localhost", 400),
        ("/v1/models", "local host", 400),
        ("/v1/models", "localhost/v1/models?", 400),
    ):
        request = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
        assert [found for found, _ in answers(send(server, request))] == [status], (target, host)
    body = json.dumps({"prompt": "a"}).encode()
    request = raw_request("http://localhost/tokenize?y", body, "Connection: close")
    assert [status for status, _ in answers(send(server, request))] == [200]


def test_answers_that_the_rfc_knows(server: Server) -> None:
    """Each with the connection's end, or followed by the answer to another request."""
    json_type = "Content-Type: application/json\r\n"
    for request, status, goes_on in (
        ("OPTIONS * HTTP/1.1\r\n", 204, True),
        ("CONNECT localhost:80 HTTP/1.1\r\n", 400, False),
        ("GET * HTTP/1.1\r\n", 400, False),
        ("PRI * HTTP/2.0\r\n", 400, False),
        ("HEAD /v1/models HTTP/1.1\r\n", 200, True),
        ("TRACE /health HTTP/1.1\r\n", 405, True),
        ("GET /health HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: h2c\r\n", 200, True),
        (f"POST /tokenize HTTP/1.1\r\n{json_type}Transfer-Encoding: gzip, chunked\r\n", 400, False),
        (f"POST /tokenize HTTP/1.1\r\n{json_type}Content-Length: +2\r\n", 400, False),
        (f"POST /tokenize HTTP/1.1\r\n{json_type}Content-Length: 2\r\nContent-Length: 3\r\n", 400, False),
        (f"POST /tokenize HTTP/1.1\r\n{json_type}Expect: 100-continue\r\nContent-Length: 99999999\r\n", 413, False),
    ):
        data = f"{request}Host: localhost\r\n\r\n".encode()
        sock = send(server, data + (raw_request("/version", b"", "Connection: close", method="GET")))
        with sock:
            found = b""
            while part := sock.recv(65536):
                found += part
        assert found.startswith(b"HTTP/1.1 %d " % status), (request, found)
        assert (b'"version"' in found) == goes_on, (request, found)
        assert goes_on or b"connection: close" in found.lower(), (request, found)
    for size in (b"zz", b"-1", b"0x5", b"", b"5 5"):
        head = f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n{json_type}Transfer-Encoding: chunked\r\n\r\n".encode()
        ((status, body),) = answers(send(server, head + size + b"\r\n{}\r\n0\r\n\r\n"))
        assert status == 400 and b'{"error":{' in body, size


@pytest.mark.parametrize("target", [b"models", b"http://", b"/v1/models"])
def test_a_head_that_is_refused_gets_headers_alone(server: Server, target: bytes) -> None:
    both = b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n"
    sock = send(server, b"HEAD " + target + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n" + both + b"\r\n")
    with sock:
        data = b""
        while part := sock.recv(65536):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and body == b""
    assert "Traceback" not in server.log()
