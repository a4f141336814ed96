"""A stream on the wire: which events in which order, and the response that owns the engine's work."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import anyio.lowlevel
import structlog
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Message, Receive, Scope, Send

from gptq_api.api.answers.choice import Piece
from gptq_api.api.answers.formats import Told
from gptq_api.api.answers.work import Work
from gptq_api.api.errors import ApiError

log = structlog.get_logger()


class Shape(Protocol):
    """How an API spells its answers. A stream is `begin`, `piece` for each piece and at last `end` or `failed`, each of
    them whole events or nothing; any other answer is `whole`."""

    ping: ServerSentEvent
    """what is sent now and then so that nobody takes a slow answer for a dead one"""

    def begin(self, work: Work) -> bytes: ...

    def piece(self, work: Work, piece: Piece) -> bytes: ...

    def end(self, work: Work) -> bytes: ...

    def failed(self, work: Work, error: ApiError) -> bytes:
        """Instead of `end`, at any moment."""

    def whole(self, work: Work, told: Sequence[Told]) -> dict[str, Any]:
        """`told`: by choice."""


async def events(work: Work, shape: Shape) -> AsyncIterator[bytes]:
    """The events of a stream, up to the last. What comes at the same moment is one item."""
    end = b""
    try:
        if begin := shape.begin(work):
            yield begin
        async for pieces in work.pieces():
            item = b""
            for piece in pieces:
                item += shape.piece(work, piece)
            if work.num_open:
                yield item
            else:
                end = item
        end += shape.end(work)
    except ApiError as error:
        work.record.error = error.error["code"]
        end += shape.failed(work, error)
    except Exception:
        log.exception("a stream failed by a bug", request_id=work.record.request_id)
        work.outcome = "bug"
        end += shape.failed(work, ApiError(500, "The server had an error while processing the request."))
    yield end


class StreamResponse(EventSourceResponse):
    """Owns what the stream needs: however it ends, even before its first chunk was asked for, `owned` is closed.

    (A generator that was never started never runs its `finally`, so the work may not belong to one.)
    """

    def __init__(self, work: Work, shape: Shape, *, owned: ExitStack, headers: dict[str, str]) -> None:
        settings = work.service.settings
        super().__init__(
            events(work, shape),
            headers=headers,
            ping=settings.sse_ping_s,
            sep="\n",  # with CRLF some readers never find the end of an event
            ping_message_factory=lambda: shape.ping,
        )
        self._send_timeout_s = settings.send_timeout_s
        self._owned = owned
        self._work = work
        self._filler = shape.ping.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._connection = scope["state"]["connection"]
        self._connection.filler = self._filler
        with self._owned:
            try:
                await super().__call__(scope, receive, send)
            except SendTimeoutError:
                self._work.outcome = "slow_reader"
                self._connection.abort()  # closing would wait for the reader who does not read
                await anyio.lowlevel.checkpoint()  # the loop tells the connection that it is lost
            finally:
                self._connection.filler = b""

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """The library's timer and all that lies between here and the socket are for a peer that makes us wait."""
        if message["body"] and self._connection.send_chunk(message["body"]):
            return
        with anyio.CancelScope() as scope, self._connection.waiting_for_reader(self._send_timeout_s, scope.cancel):
            await send(message)
        if scope.cancel_called:
            raise SendTimeoutError

    async def _listen_for_exit_signal_with_grace(self) -> None:
        """The library would cut every stream at SIGTERM, and poll for it twice a second for ever; server.py drains.

        Returning would end the stream, so this waits for as long as the stream runs.
        """
        while self.active:
            await anyio.sleep_forever()
