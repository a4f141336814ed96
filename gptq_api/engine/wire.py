"""Frames on the socket between the two processes: 4-byte little-endian length, then one msgpack message."""

from __future__ import annotations

import socket
import struct

import msgspec

from gptq_api.types import FromEngine, ToEngine

MAX_FRAME_BYTES = 64 * 2**20
"""A million-token prompt is 4 MB; more than this is a broken peer."""

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


class WireError(RuntimeError):
    """The peer sent something that is not a frame of ours."""


def frame(payload: bytes) -> bytes:
    return _LENGTH.pack(len(payload)) + payload


def encode(message: ToEngine | FromEngine) -> bytes:
    """One message -> one frame."""
    return frame(_encoder.encode(message))


def decode_to_engine(payload: bytes) -> ToEngine:
    return _to_engine.decode(payload)


def decode_from_engine(payload: bytes) -> FromEngine:
    return _from_engine.decode(payload)


class FrameBuffer:
    """Bytes as they arrive in, whole payloads out."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Append `data`; return the payloads that are complete now. Raises WireError on an absurd length."""
        buffer = self._buffer
        buffer += data
        payloads: list[bytes] = []
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_FRAME_BYTES:
                raise WireError(f"frame of {length} bytes announced")
            end = start + _LENGTH.size + length
            if len(buffer) < end:
                break
            payloads.append(bytes(buffer[start + _LENGTH.size : end]))
            start = end
        del buffer[:start]
        return payloads


def read_payload(sock: socket.socket) -> bytes | None:
    """Block until one whole payload is there; None at end of file. For the engine's reader thread."""
    head = _read_exactly(sock, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise WireError(f"frame of {length} bytes announced")
    return _read_exactly(sock, length)


def _read_exactly(sock: socket.socket, size: int) -> bytes | None:
    data = bytearray(size)
    view, filled = memoryview(data), 0
    while filled < size:
        received = sock.recv_into(view[filled:])
        if received == 0:
            return None
        filled += received
    return bytes(data)
