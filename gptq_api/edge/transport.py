"""What stands between asyncio's transport and uvicorn's protocol, and decides when h11 gets to see what arrived.

asyncio hands over what has arrived, and h11 and uvicorn work through all of it before anyone else has a turn. Here it
waits, and is parsed in slices, of which `turns.py` says when; nothing more is read while something waits.

A connection that is closed before its client has finished lingers: the client sees the answer and its end, and what it
still sends is thrown away unparsed for a moment. To what comes to a closed socket the kernel answers with a reset, at
which many clients give up without having read the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import h11

from gptq_api.edge.turns import Turns

SLICE = 2 * 1024
"""bytes that are parsed at a time: 3 ms as chunks of one byte"""
LINGER_S = 1.0
"""seconds that a client has to read an answer it got early: several round trips to anywhere"""
LINGER_BYTES = 16 * 2**20
"""bytes that are thrown away at most: twice the largest body by default; reading them takes milliseconds"""


class EdgeTransport(asyncio.Transport):
    """The transport that uvicorn knows. `parse` takes a slice; `on_change` is told when `reading` may have changed."""

    def __init__(
        self,
        transport: asyncio.Transport,
        conn: h11.Connection,
        parse: Callable[[bytes], None],
        on_change: Callable[[], None],
        turns: Turns,
    ) -> None:
        super().__init__()
        self._transport = transport
        self._conn = conn
        self._parse = parse
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._waiting = bytearray()
        self._paused = False
        """by uvicorn, because of a body that is not consumed or of a request that is not yet its turn"""
        self._turns = turns
        self._queued = False
        self._lingering = False
        self._ended = False
        self._num_discarded = 0

    @property
    def reading(self) -> bool:
        """Whether it is for the client to send; otherwise what it sent is for us to work on."""
        return not self._waiting and not self._paused

    @property
    def has_ended(self) -> bool:
        """Whether the client sends no more, and all that it sent was parsed."""
        return self._ended and not self._waiting

    def receive_end(self) -> None:
        """asyncio's transport has come to the end of what the client sends."""
        self._ended = True
        self._regulate()

    def receive(self, data: bytes) -> None:
        """What asyncio's transport has read."""
        if self._deaf:
            self._num_discarded += len(data)
            if self._num_discarded > LINGER_BYTES:
                self._transport.close()
            return
        self._waiting += data
        if not self._queued and self._turns.has_time(in_body=self._conn.their_state is h11.SEND_BODY):
            self._parse_slice()
            self._turns.spent()
        self._regulate()

    def pause_reading(self) -> None:
        self._paused = True
        self._regulate()

    def resume_reading(self) -> None:
        self._paused = False
        self._regulate()

    def take_turn(self) -> bool:
        self._parse_slice()
        self._queued = self._wants_turn
        self._regulate()
        return self._queued

    @property
    def _wants_turn(self) -> bool:
        return bool(self._waiting) and not self._paused

    def _parse_slice(self) -> None:
        if self._deaf:
            self._waiting.clear()
        elif self._wants_turn:
            piece = bytes(self._waiting[:SLICE])
            del self._waiting[:SLICE]
            try:
                self._parse(piece)
            except BaseException:
                self.abort()  # asyncio does so only for what it calls itself
                raise

    def _regulate(self) -> None:
        if self._ended:
            pass  # asyncio has left off reading
        elif self.reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()
        if self._wants_turn and not self._queued:
            self._queued = True
            self._turns.join(self)
        self._on_change()

    @property
    def _deaf(self) -> bool:
        """Whether nothing the client may send can be a part of a request."""
        return self.is_closing() or self._conn.their_state in (h11.MUST_CLOSE, h11.CLOSED, h11.ERROR)

    def is_closing(self) -> bool:
        return self._lingering or self._transport.is_closing()

    def close(self, *, linger: bool = False) -> None:
        """Send what is buffered and close; linger where the client is in the middle of a body or of nonsense, and where
        `linger` says that it is about to send."""
        if self.is_closing():
            return
        if not linger and not self._waiting and self._conn.their_state not in (h11.SEND_BODY, h11.ERROR):
            self._transport.close()
            return
        self._lingering = True
        self._waiting.clear()
        with contextlib.suppress(OSError):  # the peer may have gone
            self._transport.write_eof()
        self._loop.call_later(LINGER_S, self._transport.close)
        self.resume_reading()

    def abort(self) -> None:
        self._transport.abort()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._transport.write(data)

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)
