"""Frames survive any fragmentation; messages survive the round trip; an absurd length is refused."""

from __future__ import annotations

import socket
import threading

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptq_api import frames
from gptq_api.engine import wire
from gptq_api.types import (
    Abort,
    Add,
    EngineStats,
    Failed,
    SamplingParams,
    StepOutput,
    TokenLogprobs,
    pack_ids,
    unpack_ids,
)


@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(1, 64))
def test_any_fragmentation_gives_the_same_payloads(payloads: list[bytes], piece: int) -> None:
    stream = b"".join(frames.frame(payload) for payload in payloads)
    buffer = frames.FrameBuffer()
    received: list[bytes] = []
    for start in range(0, len(stream), piece):
        received += buffer.feed(stream[start : start + piece])
    assert received == payloads


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_ids_round_trip(ids: list[int]) -> None:
    assert unpack_ids(pack_ids(ids)) == ids


def test_messages_round_trip() -> None:
    params = SamplingParams(max_tokens=5, logit_bias={7: -100.0}, stop_token_ids=(2,), seed=2**63 - 1, top_logprobs=3)
    for message in (Add(1, pack_ids([1, 2, 3]), (params, params), b"salt"), Abort((7, 9))):
        assert wire.decode_to_engine(wire.encode(message)[4:]) == message
    stats = EngineStats(1, 2, 3, 4, 5, 6, 7, 8)
    step = StepOutput(
        sequence_ids=pack_ids([1]),
        tokens=pack_ids([9]),
        finished={1: "stop"},
        cached_tokens={1: 16},
        logprobs={1: TokenLogprobs(-0.5, [(9, -0.5), (3, -1.0)])},
        stats=stats,
    )
    for sent in (step, Failed("no such file")):
        assert wire.decode_from_engine(wire.encode(sent)[4:]) == sent


def test_a_foreign_message_is_refused() -> None:
    with pytest.raises(frames.WireError):
        wire.decode_to_engine(msgspec.msgpack.encode({"type": "add", "first_id": "x"}))
    with pytest.raises(frames.WireError):
        frames.FrameBuffer().feed(b"\xff\xff\xff\xff")


def test_blocking_reader_reassembles_and_sees_the_end() -> None:
    ours, theirs = socket.socketpair()
    payload = bytes(range(256)) * 5000

    def send() -> None:
        with ours:
            ours.sendall(frames.frame(payload) + frames.frame(b"") + b"\x05\x00")

    thread = threading.Thread(target=send)
    thread.start()
    with theirs:
        assert frames.read_payload(theirs) == payload
        assert frames.read_payload(theirs) == b""
        assert frames.read_payload(theirs) is None
    thread.join()
