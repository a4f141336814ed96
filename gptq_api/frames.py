"""Frames on a socket between two processes of ours: 4-byte little-endian length, then that many bytes."""

from __future__ import annotations

import socket
import struct

MAX_FRAME_BYTES = 64 * 2**20
"""A million-token prompt is 4 MB; more than this is a broken peer."""

_LENGTH = struct.Struct("<I")


class WireError(RuntimeError):
    """The peer sent something that is not a frame of ours."""


def frame(payload: bytes) -> bytes:
    return _LENGTH.pack(len(payload)) + payload


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
    """Block until one whole payload is there, and read no further; None at end of file."""
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
