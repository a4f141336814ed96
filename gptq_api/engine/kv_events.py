"""What the prefix cache holds, published as vLLM does: for routers that send a prompt where its beginning is cached.

ZeroMQ messages of three frames: topic, number (8 bytes, big-endian, from 0), and an `EventBatch` in msgpack, where each
event is an array that begins with its name. So vLLM wrote it until June 2026, and llm-d reads that as well as the maps
that vLLM writes since. A second socket sends again what a reader has missed: who sends it a number gets (number, batch)
for all from there on that are still kept, and at last the number -1.

The engine's thread only appends to a list. Encoding and sending is another thread's; where that is behind, batches are
dropped and counted, and the numbers have a gap there. A reader that is too slow misses numbers as well.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from gptq_api.errors import UserError

if TYPE_CHECKING:
    import zmq

_log = logging.getLogger(__name__)

MOST_QUEUED = 1000
"""batches that wait for the thread; one a step"""
MOST_KEPT = 10_000
"""batches that can be sent again"""
MOST_UNREAD = 10_000
"""batches that wait for a reader"""
END = (-1).to_bytes(8, "big", signed=True)
_LINGER_MS, _CLOSE_S = 200, 1.0
_ELSEWHERE = {errno.EADDRNOTAVAIL, errno.ENODEV}
"""what binding says of an address that is not of this machine, and of a name"""


class _KvEvent(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False, tag=True):
    pass


class BlockStored(_KvEvent, frozen=True):
    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(_KvEvent, frozen=True):
    block_hashes: list[bytes]
    medium: str | None


class AllBlocksCleared(_KvEvent, frozen=True):
    """Nothing is cached: an engine begins or ends."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False):
    ts: float
    """Unix time, seconds"""
    events: list[Event]
    data_parallel_rank: int | None = None


@dataclass(frozen=True)
class KvEventsAt:
    """The settings --kv-events, --kv-events-replay and --kv-events-topic (config.py)."""

    endpoint: str
    replay: str | None
    topic: str | None


class Publisher:
    """Owns the sockets and the thread that sends."""

    def __init__(self, at: KvEventsAt) -> None:
        """Raises UserError where there is no pyzmq, or an address cannot be had."""
        try:
            import zmq
        except ImportError:
            raise UserError("--kv-events needs pyzmq, which is not installed: pip install 'gptq-api[events]'") from None
        self._zmq, self._topic = zmq, (at.topic or "").encode()
        self.num_dropped = 0
        self._next_number = 0
        self._queue: deque[tuple[int, EventBatch]] = deque()
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=MOST_KEPT)
        self._context = zmq.Context()
        self._events = self._context.socket(zmq.PUB)
        self._events.set_hwm(MOST_UNREAD)
        _open("--kv-events", self._events, at.endpoint)
        self._replay: zmq.Socket[bytes] | None = None
        if at.replay is not None:
            self._replay = self._context.socket(zmq.ROUTER)
            self._replay.setsockopt(zmq.SNDHWM, 2 * MOST_KEPT)  # all that are kept, for a reader
            _open("--kv-events-replay", self._replay, at.replay, others=False)
        self._waking, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def publish(self, events: list[Event]) -> None:
        """Never waits."""
        number, self._next_number = self._next_number, self._next_number + 1
        if len(self._queue) >= MOST_QUEUED:
            if not self.num_dropped:
                _log.warning("KV events are dropped: their thread is %d batches behind", MOST_QUEUED)
            self.num_dropped += 1
            return
        self._queue.append((number, EventBatch(time.time(), events, 0)))
        self._rouse()

    def close(self) -> None:
        """What is queued is sent, as far as somebody reads it soon."""
        if not self._closing:
            self._closing = True
            self._rouse()
            self._thread.join(_CLOSE_S)

    def _rouse(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it has not looked for the last 64 thousand times
            os.write(self._wake, b"\0")

    def _run(self) -> None:
        poller = self._zmq.Poller()
        poller.register(self._waking, self._zmq.POLLIN)
        if self._replay is not None:
            poller.register(self._replay, self._zmq.POLLIN)
        try:
            while not self._closing:
                ready = dict(poller.poll())
                if self._waking in ready:
                    os.read(self._waking, 65536)
                self._send()
                if self._replay is not None and self._replay in ready:
                    self._send_again(self._replay)
            self._send()
            self._context.destroy(linger=_LINGER_MS)
        except self._zmq.ZMQError:
            _log.exception("KV events end here, by a bug")
            self._closing = True

    def _send(self) -> None:
        while self._queue:
            number, batch = self._queue.popleft()
            numbered = number.to_bytes(8, "big"), msgspec.msgpack.encode(batch)
            self._kept.append(numbered)
            self._events.send_multipart((self._topic, *numbered))

    def _send_again(self, replay: zmq.Socket[bytes]) -> None:
        """What is no request of 8 bytes behind an empty frame is passed over."""
        reader, *rest = replay.recv_multipart()
        if len(rest) != 2 or rest[0] or len(rest[1]) != 8:
            return
        first = int.from_bytes(rest[1], "big")
        for number, payload in (*(kept for kept in self._kept if int.from_bytes(kept[0], "big") >= first), (END, b"")):
            try:
                replay.send_multipart((reader, b"", number, payload), self._zmq.NOBLOCK)
            except self._zmq.Again:  # it does not read
                return


def _open(setting: str, socket: zmq.Socket[bytes], endpoint: str, *, others: bool = True) -> None:
    """An address of this machine is listened on; with `others`, that of another one is connected to, whether somebody
    listens there or not."""
    import zmq

    try:
        socket.bind(endpoint)
        return
    except zmq.ZMQError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"{setting} {endpoint} is in use: choose another port") from None
        if error.errno not in _ELSEWHERE or not others:
            raise UserError(f"{setting} {endpoint} cannot be listened on: {error.strerror}") from None
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise UserError(f"{setting} {endpoint} can be neither listened on nor connected to: {error.strerror}") from None


class KvEvents:
    """The scheduler's `CacheListener`: what changes between two calls of `flush` is one batch."""

    def __init__(self, publish: Callable[[list[Event]], None], block_size: int, device: str) -> None:
        self._publish, self._block_size = publish, block_size
        self._medium = "CPU" if device == "cpu" else "GPU"
        self._events: list[Event] = [AllBlocksCleared()]  # a reader may know what an engine before this one had
        self.flush()

    def stored(self, hashes: list[bytes], parent: bytes | None, token_ids: list[int]) -> None:
        self._events.append(BlockStored(hashes, parent, token_ids, self._block_size, None, self._medium, None))

    def removed(self, content: bytes) -> None:
        self._events.append(BlockRemoved([content], self._medium))

    def flush(self) -> None:
        """Publish what has changed, if anything has."""
        if self._events:
            events, self._events = self._events, []
            self._publish(events)

    def end(self) -> None:
        """The engine ends, and its cache with it."""
        self._events.append(AllBlocksCleared())
        self.flush()
