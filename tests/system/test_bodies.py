"""Large, slow and unfinished bodies: what they hold, whom they keep waiting, and who is not read at all."""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

from tests.support.heavy_bodies import (
    CHAT,
    answer,
    connect,
    health_seconds,
    heavy_requests,
    resident,
    senders,
    unfinished_bodies,
)
from tests.support.server import Server, chat_body, check_error, raw_request, wait_for

MIB = 2**20


def test_heavy_bodies_do_not_stop_the_event_loop(server: Server) -> None:
    """/health beside three senders of each; where all of it was done on the loop, 0.3 to 2 s."""
    for name, request in heavy_requests().items():
        with senders(server, request, 3):
            seconds = health_seconds(server, 40, 4)
        assert statistics.median(seconds) < 0.15, name
    assert server.chat(max_tokens=2).status_code == 200


def test_what_is_as_large_as_the_limits_allow_is_answered(server: Server) -> None:
    long = chat_body("x" * 300_000, max_tokens=2)
    assert check_error(server.post(CHAT, long), 400, "messages", "context_length_exceeded")
    ids = {"prompt": [[7] * 500] * 400, "max_tokens": 1}
    assert len(server.post("/v1/completions", ids).json()["choices"]) == 400
    calls = json.dumps({"items": [[i] for i in range(20_000)]})
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": calls}}
    spoken: dict[str, Any] = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    }
    check_error(server.post(CHAT, spoken), 400, "messages", "context_length_exceeded")
    spoken["messages"][1]["tool_calls"] = [call] * 4
    assert "keys, arrays" in check_error(server.post(CHAT, spoken), 400, None, "request_too_large")["message"]


def test_a_large_body_is_wrong_in_the_words_of_a_small_one(server: Server) -> None:
    wrong: tuple[dict[str, Any], ...] = (
        {"temperature": 3},
        {"messages": [{"role": "nobody", "content": "a"}]},
        {"messages": []},
        {"stop": [""]},
        {"stream_options": {"include_usage": 3}},
    )
    for fields in wrong:
        small = server.post(CHAT, {**chat_body(), **fields})
        large = server.post(CHAT, {**chat_body(), **fields, "user": "a", "unknown": "x" * 100_000})
        assert small.status_code == 400 and small.json() == large.json()


def test_unfinished_bodies_hold_little_and_make_room() -> None:
    with Server() as server:
        assert server.chat(max_tokens=2).status_code == 200
        before = resident(server.process.pid)
        with unfinished_bodies(server, 50, 2 * MIB - 10):
            assert resident(server.process.pid) - before < 64 * MIB
            assert server.chat(max_tokens=2).status_code == 200, "small ones have room"
            large = raw_request(CHAT, json.dumps(chat_body("x" * MIB)).encode())
            with unfinished_bodies(server, 16, 2 * MIB - 10, chunked=True):  # whatever room there is
                # read, and refused as too long a prompt, at the latest when others have stalled
                wait_for(lambda: b" 400 " in first_line(server, large), 20)
            assert server.log().count("status=429") > 20
        wait_for(lambda: b" 400 " in first_line(server, large), 10)


def first_line(server: Server, request: bytes) -> bytes:
    sock = connect(server)
    sock.sendall(request.replace(b"Host:", b"Connection: close\r\nHost:", 1))
    return answer(sock).partition(b"\r\n")[0]


def test_nothing_is_read_where_there_is_no_place() -> None:
    """Of what is large, also where it would be sent after `100 Continue` only."""
    with Server("--max-queued-requests", "1", "--max-num-seqs", "1") as server:
        endless = chat_body(ignore_eos=True, stream=True)
        with server.http.stream("POST", CHAT, json=endless) as stream:
            lines = stream.iter_lines()
            next(lines)
            for extra in (["Content-Length: 1000000"], ["Content-Length: 1000000", "Expect: 100-continue"]):
                head = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
                sock = connect(server)
                sock.sendall("\r\n".join([*head, *extra, "", ""]).encode())
                started = time.monotonic()
                told = answer(sock)
                assert told.startswith(b"HTTP/1.1 429 ") and b"retry-after: " in told and b"server_full" in told
                assert time.monotonic() - started < 5
            check_error(server.post(CHAT, {"messages": 3}), 400, "messages")


def test_the_limit_follows_the_context(server: Server, strict_server: Server) -> None:
    message = check_error(server.post(CHAT, chat_body("x" * 2 * MIB)), 413, None, "request_too_large")["message"]
    assert f"{2 * MIB} bytes" in message and "--max-body-bytes" in message
    with Server("--max-body-bytes", str(5 * MIB)) as other:
        check_error(other.post(CHAT, chat_body("x" * 4 * MIB)), 400, "messages", "context_length_exceeded")
