"""The bytes of answers: whole ones, and the chunks of a stream.

A chunk is a per-request template around one JSON string, so that nothing is built per token but that string. U+2028,
U+2029 and U+0085 are escaped: they end a line for some readers (httpx's iter_lines) in the middle of the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from gptq_api.api.generate import Piece
from gptq_api.api.logprobs import TokenEntry

DONE = b"data: [DONE]\n\n"

Logprobs = Callable[[list[TokenEntry]], dict[str, Any]]


def json_bytes(value: Any) -> bytes:
    """UTF-8 JSON on one line, whoever splits it."""
    data = msgspec.json.encode(value)
    if b"\xe2\x80" in data or b"\xc2\x85" in data:
        data = data.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
        data = data.replace(b"\xc2\x85", b"\\u0085")
    return data


def error_event(error: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes({"error": error}) + b"\n\n"


@dataclass(slots=True, frozen=True)
class Head:
    """What is the same in every chunk of a stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


class _Chunks:
    """`data: {head,"choices":[...],usage}` with the head encoded once."""

    def __init__(self, head: Head, kind: str, with_usage: bool, logprobs: Logprobs | None) -> None:
        self._start = b"data: " + json_bytes(head.fields(kind))[:-1] + b',"choices":['
        self._end = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        self._logprobs = logprobs

    def chunk(self, choice: bytes, usage: dict[str, Any] | None = None) -> bytes:
        """One chunk of one choice; with no choice it is the usage chunk."""
        end = self._end if usage is None else b'],"usage":' + json_bytes(usage) + b"}\n\n"
        return self._start + choice + end

    def told(self, entries: list[TokenEntry]) -> bytes:
        return b"null" if self._logprobs is None or not entries else json_bytes(self._logprobs(entries))


class ChatChunks(_Chunks):
    def __init__(self, head: Head, with_usage: bool, logprobs: Logprobs | None) -> None:
        super().__init__(head, "chat.completion.chunk", with_usage, logprobs)

    def first(self, index: int, text: str) -> bytes:
        """The role, once; no text, so that the first text marks the first token."""
        return b'{"index":%d,"delta":{"role":"assistant","content":%b},"logprobs":null,"finish_reason":null}' % (
            index,
            json_bytes(text),
        )

    def text(self, piece: Piece) -> bytes:
        return b'{"index":%d,"delta":{"content":%b},"logprobs":%b,"finish_reason":null}' % (
            piece.choice.index,
            json_bytes(piece.text),
            self.told(piece.entries),
        )

    def last(self, piece: Piece) -> bytes:
        """Why it ended. Holds log-probabilities only where tokens without text were left to tell."""
        return b'{"index":%d,"delta":{},"logprobs":%b,"finish_reason":"%b"}' % (
            piece.choice.index,
            self.told([] if piece.text else piece.entries),
            (piece.finish_reason or "").encode(),
        )


class CompletionChunks(_Chunks):
    def __init__(self, head: Head, with_usage: bool, logprobs: Logprobs | None) -> None:
        super().__init__(head, "text_completion", with_usage, logprobs)

    def first(self, index: int, text: str) -> bytes | None:
        """The echoed prompt, where there is one."""
        if not text:
            return None
        return b'{"index":%d,"text":%b,"logprobs":null,"finish_reason":null}' % (index, json_bytes(text))

    def text(self, piece: Piece) -> bytes:
        return b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":null}' % (
            piece.choice.index,
            json_bytes(piece.text),
            self.told(piece.entries),
        )

    def last(self, piece: Piece) -> bytes:
        return b'{"index":%d,"text":"","logprobs":%b,"finish_reason":"%b"}' % (
            piece.choice.index,
            self.told([] if piece.text else piece.entries),
            (piece.finish_reason or "").encode(),
        )
