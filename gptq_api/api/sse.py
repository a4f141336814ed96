"""A stream on the wire: which chunks in which order, and the response that owns the engine's work."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack

import anyio.lowlevel
import structlog
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Message, Receive, Scope, Send

from gptq_api.api.errors import ApiError
from gptq_api.api.generate import Work
from gptq_api.api.schema import StreamOptions
from gptq_api.api.shapes import DONE, ChatChunks, CompletionChunks, error_event

log = structlog.get_logger()


async def events(
    work: Work, chunks: ChatChunks | CompletionChunks, options: StreamOptions, prefixes: Sequence[str]
) -> AsyncIterator[bytes]:
    """`data:` events: first chunks, text, finish chunks, usage, [DONE]; after an error [DONE] too. What comes at the
    same moment is one item.

    `prefixes`: the text each choice begins with (an echoed prompt), or "".
    """
    running = options.continuous_usage_stats
    num_open = len(work.choices)
    end = b""
    try:
        firsts = [chunks.first(choice.index, prefix) for choice, prefix in zip(work.choices, prefixes, strict=True)]
        if begin := b"".join([chunks.chunk(first, work.usage() if running else None) for first in firsts if first]):
            yield begin
        async for pieces in work.pieces():
            usage = work.usage() if running else None
            item = b""
            for piece in pieces:
                if piece.text:
                    item += chunks.chunk(chunks.text(piece), usage)
                if piece.finish_reason is not None:
                    item += chunks.chunk(chunks.last(piece), usage)
                    num_open -= 1
            if num_open:
                yield item
            else:
                end = item
        if options.include_usage:
            end += chunks.chunk(b"", work.usage())
    except ApiError as error:
        end += error_event(error.error)
    except Exception:
        log.exception("a stream failed by a bug", request_id=work.record.request_id)
        work.outcome = "bug"
        end += error_event(ApiError(500, "The server had an error while processing the request.").error)
    yield end + DONE


class StreamResponse(EventSourceResponse):
    """Owns what the stream needs: however it ends, even before its first chunk was asked for, `owned` is closed.

    (A generator that was never started never runs its `finally`, so the work may not belong to one.)
    """

    def __init__(
        self,
        content: AsyncIterator[bytes],
        *,
        owned: ExitStack,
        work: Work,
        headers: dict[str, str],
        ping_s: float,
        send_timeout_s: float,
    ) -> None:
        super().__init__(
            content,
            headers=headers,
            ping=ping_s,
            sep="\n",  # with CRLF some readers never find the end of an event
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            send_timeout=send_timeout_s,
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
