"""The lines of a batch's output, as OpenAI has them."""

from __future__ import annotations

import msgspec


class Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class ErrorOfLine(msgspec.Struct):
    code: str
    message: str


class OutputLine(msgspec.Struct):
    id: str
    custom_id: str
    response: Response | None
    error: ErrorOfLine | None


UNFINISHED = {
    "expired": ErrorOfLine("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ErrorOfLine("batch_cancelled", "This request was not executed: the batch was cancelled."),
}
"""by how a batch ended, of requests that have no answer"""
_encoder = msgspec.json.Encoder()


def answered(line_id: str, custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
    """The line of a request that was answered. `body`: JSON on one line."""
    return _line(OutputLine(line_id, custom_id, Response(status, request_id, msgspec.Raw(body)), None))


def unanswered(line_id: str, custom_id: str, error: ErrorOfLine) -> bytes:
    """The line of a request that was not."""
    return _line(OutputLine(line_id, custom_id, None, error))


def _line(line: OutputLine) -> bytes:
    return _encoder.encode(line) + b"\n"
