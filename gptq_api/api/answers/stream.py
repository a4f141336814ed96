"""A stream on the wire: which events in which order, and the response that owns the engine's work."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack

import anyio.lowlevel
import structlog
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Message, Receive, Scope, Send

from gptq_api.api.answers.encoding import json_bytes
from gptq_api.api.answers.formats import Format
from gptq_api.api.answers.work import Work
from gptq_api.api.errors import ApiError

log = structlog.get_logger()

DONE = b"data: [DONE]\n\n"


async def events(work: Work, shape: Format) -> AsyncIterator[bytes]:
    """`data:` events up to [DONE], which comes after an error too. What comes at the same moment is one item."""
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
        end += _error_event(error)
    except Exception:
        log.exception("a stream failed by a bug", request_id=work.record.request_id)
        work.outcome = "bug"
        end += _error_event(ApiError(500, "The server had an error while processing the request."))
    yield end + DONE


def _error_event(error: ApiError) -> bytes:
    return b"data: " + json_bytes({"error": error.error}) + b"\n\n"


class StreamResponse(EventSourceResponse):
    """Owns what the stream needs: however it ends, even before its first chunk was asked for, `owned` is closed.

    (A generator that was never started never runs its `finally`, so the work may not belong to one.)
    """

    def __init__(self, work: Work, shape: Format, *, owned: ExitStack, headers: dict[str, str]) -> None:
        settings = work.service.settings
        super().__init__(
            events(work, shape),
            headers=headers,
            ping=settings.sse_ping_s,
            sep="\n",  # with CRLF some readers never find the end of an event
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            send_timeout=settings.send_timeout_s,
        )
        self._owned = owned
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._connection = scope["state"]["connection"]
        with self._owned:
            try:
                await super().__call__(scope, receive, send)
            except SendTimeoutError:
                self._work.outcome = "slow_reader"
                self._connection.abort()  # closing would wait for the reader who does not read
                await anyio.lowlevel.checkpoint()  # the loop tells the connection that it is lost

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """The library's timer and all that lies between here and the socket are for a peer that makes us wait."""
        if not (message["body"] and self._connection.send_chunk(message["body"])):
            await super()._send_with_timeout(send, message)

    async def _listen_for_exit_signal_with_grace(self) -> None:
        """The library would cut every stream at SIGTERM, and poll for it twice a second for ever; server.py drains.

        Returning would end the stream, so this waits for as long as the stream runs.
        """
        while self.active:
            await anyio.sleep_forever()
