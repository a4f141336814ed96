"""Requests whose beginning and end can be read in two ways, on bare sockets: one answer at most, and the end of the
connection, so that no proxy in front and server behind can take different requests for the next one."""

from __future__ import annotations

import re
import socket

import pytest

from tests.support.server import Server

NEXT = b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
"""what a smuggler hopes for an answer to"""
JSON = b"Host: 127.0.0.1\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt":"x"}'
CHUNKED = b"POST /tokenize HTTP/1.1\r\n" + JSON + b"Transfer-Encoding: chunked\r\n\r\n"


def post(*lines: bytes, body: bytes = BODY, version: bytes = b"1.1") -> bytes:
    return b"\r\n".join([b"POST /tokenize HTTP/" + version, JSON.rstrip(), *lines, b"", body])


def get(*lines: bytes, target: bytes = b"/health", method: bytes = b"GET", version: bytes = b"HTTP/1.1") -> bytes:
    return b"\r\n".join(
        [b" ".join(filter(None, (method, target, version))), *(lines or (b"Host: 127.0.0.1",)), b"", b""]
    )


def exchange(server: Server, data: bytes, end: bool = False) -> bytes:
    """All that comes back until the connection ends, or nothing comes for a while; `end`: nothing more will be sent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=3) as sock:
        try:
            sock.sendall(data)
            if end:
                sock.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        received = b""
        try:
            while part := sock.recv(65536):
                received += part
        except (TimeoutError, ConnectionResetError):
            pass
        return received


def statuses(data: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", data)]


LENGTH = b"Content-Length: %d" % len(BODY)
TWO_ENDS = {
    "length and chunks": post(LENGTH, b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "chunks and length": post(b"Transfer-Encoding: chunked", b"Content-Length: 5", body=b"0\r\n\r\n"),
    "length and chunks of a GET": get(b"Host: 127.0.0.1", b"Content-Length: 5", b"Transfer-Encoding: chunked"),
    "two lengths": post(LENGTH, b"Content-Length: 3"),
    "two lengths in a line": post(b"Content-Length: 14, 3"),
    "a length with a sign": post(b"Content-Length: +14"),
    "a negative length": post(b"Content-Length: -14"),
    "a length in hexadecimal": post(b"Content-Length: 0xe"),
    "a length with a space": post(b"Content-Length: 1 4"),
    "an empty length": post(b"Content-Length:"),
    "a length in other digits": post("Content-Length: ١٤".encode()),
    "a coding nobody knows": post(b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n"),
    "chunks twice": post(b"Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"),
    "gzip in chunks": post(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    "chunks, then identity": post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", body=b"0\r\n\r\n"),
    "a quoted coding": post(b'Transfer-Encoding: "chunked"', body=b"0\r\n\r\n"),
    "a space before the colon": post(b"Transfer-Encoding : chunked", body=b"0\r\n\r\n"),
    "a folded coding": post(b"Transfer-Encoding:\r\n chunked", LENGTH),
    "a NUL in a header": get(b"Host: 127.0.0.1", b"X: a\0b"),
    "a carriage return in a header": get(b"Host: 127.0.0.1", b"X: a\rContent-Length: 5"),
    "a header without a name": get(b"Host: 127.0.0.1", b": x"),
    "a header with a space in its name": get(b"Host: 127.0.0.1", b"Content Length: 5"),
    "a header without a colon": get(b"Host: 127.0.0.1", b"Content-Length"),
    "a line that begins with a space": get(b" Host: 127.0.0.1"),
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": get(b"Host: 127.0.0.1", b"Host: localhost"),
    "no size": CHUNKED + b"\r\nx\r\n0\r\n\r\n",
    "a size that is no number": CHUNKED + b"zz\r\nx\r\n0\r\n\r\n",
    "a negative size": CHUNKED + b"-1\r\nx\r\n0\r\n\r\n",
    "a size with a sign": CHUNKED + b"+e\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a size with 0x": CHUNKED + b"0xe\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a size of 70 bits": CHUNKED + b"f" * 18 + b"\r\n" + BODY,
    "a size of a kilobyte": CHUNKED + b"0" * 1000 + b"e\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a chunk longer than its size": CHUNKED + b"3\r\n" + BODY + b"\r\n0\r\n\r\n",
    "an extension without an end": CHUNKED + b"e;" + b"a" * 100_000 + b"\r\n" + BODY + b"\r\n0\r\n\r\n",
    "trailers without an end": CHUNKED + b"0\r\n" + b"X: a\r\n" * 20_000,
    "two spaces": b"GET  /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a tab": b"GET\t/health\tHTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a version that is none": get(version=b"HTTP/1.x"),
    "a version of two digits": get(version=b"HTTP/11.1"),
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 300 + b"\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "an empty line before": b"\r\n" + get(),
    "nothing but line ends": b"\r\n" * 50,
    "a target with a space": get(target=b"/health x"),
    "a target that is not ASCII": get(target="/hé".encode()),
    "a target with a NUL": get(target=b"/health\0"),
    "a target of 64 KiB": get(target=b"/" + b"a" * 65536),
    "a header of 64 KiB": get(b"Host: 127.0.0.1", b"X: " + b"a" * 65536),
    "5,000 headers": get(b"Host: 127.0.0.1", *(b"X-%d: a" % i for i in range(5000))),
}
"""these are refused, and nothing behind them is read"""


@pytest.mark.parametrize("name", TWO_ENDS)
def test_what_has_no_certain_end_ends_the_connection(server: Server, name: str) -> None:
    received = exchange(server, TWO_ENDS[name] + NEXT, end=True)
    assert statuses(received) in ([400], []), received
    assert b'"version"' not in received
    if received:
        head, _, body = received.partition(b"\r\n\r\n")
        assert b"connection: close" in head.lower() and body.startswith(b'{"error":'), received


FINE: dict[str, tuple[bytes, list[int]]] = {
    "a length": (post(LENGTH), [200, 200]),
    "a length twice": (post(LENGTH, LENGTH), [200, 200]),
    "chunks": (CHUNKED + b"E\r\n" + BODY + b"\r\n0\r\n\r\n", [200, 200]),
    "an extension": (CHUNKED + b'00e;a="b"\r\n' + BODY + b"\r\n0\r\n\r\n", [200, 200]),
    "trailers": (CHUNKED + b"e\r\n" + BODY + b"\r\n0\r\nX: Content-Length: 5\r\n\r\n", [200, 200]),
    "spaces around a value": (post(b"Content-Length: \t 14 \t"), [200, 200]),
    "a GET with a body": (get(b"Host: 127.0.0.1", b"Content-Length: 3") + b"abc", [200, 200]),
    "an unknown method": (get(method=b"BREW"), [405, 200]),
    "a method in small letters": (get(method=b"get"), [405, 200]),
    "the options of all": (get(method=b"OPTIONS", target=b"*"), [204, 200]),
    "another expectation": (post(LENGTH, b"Expect: tea"), [200, 200]),
    "a promise": (post(LENGTH, b"Expect: 100-continue"), [200, 200]),
    "an upgrade": (get(b"Host: 127.0.0.1", b"Upgrade: websocket", b"Connection: Upgrade"), [200, 200]),
    "a fragment": (get(target=b"/health#/metrics"), [404, 200]),
    "a query": (get(target=b"/health?a=b&a=%zz"), [200, 200]),
    "HTTP/1.0": (get(version=b"HTTP/1.0"), [200]),
    "HTTP/1.0 that wants to stay": (get(b"Host: 127.0.0.1", b"Connection: keep-alive", version=b"HTTP/1.0"), [200]),
    "the target of a proxy": (get(target=b"http://127.0.0.1/health"), [200, 200]),
    "fifty in a row": (get() * 50, [200] * 51),
}
"""with the statuses of these and of NEXT behind them"""


@pytest.mark.parametrize("name", FINE)
def test_what_is_odd_but_clear_has_its_answer(server: Server, name: str) -> None:
    data, expected = FINE[name]
    received = exchange(server, data + NEXT)
    assert [status for status in statuses(received) if status != 100] == expected, received


@pytest.mark.parametrize("name", ["a length", "chunks", "fifty in a row"])
def test_who_says_that_it_has_sent_everything_gets_its_answers(server: Server, name: str) -> None:
    data, expected = FINE[name]
    assert statuses(exchange(server, data + NEXT, end=True)) == expected


def test_a_promise_is_kept(server: Server) -> None:
    """Nothing of the body is sent before the server asks for it; where it refuses at once it does not ask."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(post(LENGTH, b"Expect: 100-continue", body=b""))
        assert sock.recv(4096).startswith(b"HTTP/1.1 100 ")
        sock.sendall(BODY)
        assert b"HTTP/1.1 200 " in sock.recv(4096)
    refused = post(b"Content-Length: 999999999999", b"Expect: 100-continue", body=b"")
    assert statuses(exchange(server, refused)) == [413]
