"""Answers of Anthropic's Messages API: a message of content blocks, or events that tell how they come to be."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from sse_starlette import ServerSentEvent

from gptq_api.api.answers.choice import Choice, Piece
from gptq_api.api.answers.encoding import json_bytes
from gptq_api.api.answers.formats import Told
from gptq_api.api.answers.work import Work
from gptq_api.api.errors import ApiError
from gptq_api.api.messages_errors import messages_error
from gptq_api.api.tool_names import Origin
from gptq_api.text.parts import CallDelta

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_SIGNATURE = "unsigned"
"""Of thoughts: clients demand one, and send it back. Here nobody reads it."""


class MessagesShape:
    """One answer. A delta is a template of its block around one JSON string."""

    ping = ServerSentEvent(event="ping", data='{"type": "ping"}', sep="\n")

    def __init__(
        self, model: str, origin: Callable[[str], Origin], stop_sequences: Sequence[str], *, thinking: bool
    ) -> None:
        """`origin`: the tool behind a name that the model used; `thinking`: whether thoughts are told."""
        self._model = model
        self._origin = origin
        self._stop_sequences = stop_sequences
        self._thinking = thinking
        self._id = f"msg_{uuid.uuid4().hex}"
        self._started = False
        self._num_blocks = 0
        self._open: str | None = None
        self._delta = b""
        """what an event with more of the open block begins with"""
        self._end: dict[str, Any] = {}

    def begin(self, work: Work) -> bytes:
        """Nothing yet: how much of the prompt was cached, which clients read in the first event, is known with the
        first token."""
        return b""

    def piece(self, work: Work, piece: Piece) -> bytes:
        events = self._begun(work)
        if piece.reasoning and self._thinking:
            events += self._switched("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            events += self._delta + json_bytes(piece.reasoning) + b"}}\n\n"
        if piece.text:
            events += self._switched("text", {"type": "text", "text": ""})
            events += self._delta + json_bytes(piece.text) + b"}}\n\n"
        for delta in piece.calls:
            events += self._more_of_call(delta)
        if piece.finish_reason is not None:
            if not self._num_blocks and self._open is None:
                events += self._switched("text", {"type": "text", "text": ""})  # an answer without a word
            events += self._closed()
            self._end = self._ended(piece.choice, piece.finish_reason)
        return events

    def end(self, work: Work) -> bytes:
        delta = {"type": "message_delta", "delta": self._end, "usage": _usage(work)}
        return self._begun(work) + _event(b"message_delta", delta) + _event(b"message_stop", {"type": "message_stop"})

    def failed(self, work: Work, error: ApiError) -> bytes:
        return _event(b"error", messages_error(error.status_code, error.error, work.record.request_id))

    def whole(self, work: Work, told: Sequence[Told]) -> dict[str, Any]:
        answer = told[0]
        blocks: list[dict[str, Any]] = []
        if answer.reasoning and self._thinking:
            blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": _SIGNATURE})
        if answer.text or not (answer.calls or blocks):
            blocks.append({"type": "text", "text": answer.text})
        for call in answer.calls:
            block = {"type": "tool_use", "id": call.id, "name": self._origin(call.name).name}
            blocks.append({**block, "input": _arguments(call.arguments)})
        return self._message(blocks, self._ended(work.choices[0], answer.finish_reason), work)

    def _message(self, content: list[dict[str, Any]], end: dict[str, Any], work: Work) -> dict[str, Any]:
        head = {"id": self._id, "type": "message", "role": "assistant", "model": self._model}
        return {**head, "content": content, **end, "usage": _usage(work)}

    def _ended(self, choice: Choice, reason: str) -> dict[str, Any]:
        if reason == "stop" and choice.stop_string in self._stop_sequences:
            return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_string}
        return {"stop_reason": _REASONS[reason], "stop_sequence": None}

    def _begun(self, work: Work) -> bytes:
        if self._started:
            return b""
        self._started = True
        message = self._message([], {"stop_reason": None, "stop_sequence": None}, work)
        return _event(b"message_start", {"type": "message_start", "message": message})

    def _switched(self, kind: str, block: dict[str, Any]) -> bytes:
        """Events up to where a block of this type is open."""
        return b"" if self._open == kind else self._closed() + self._opened(kind, block)

    def _opened(self, kind: str, block: dict[str, Any]) -> bytes:
        self._open = kind
        delta, name = _DELTAS[kind]
        head = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,' % self._num_blocks
        self._delta = head + b'"delta":{"type":"%b","%b":' % (delta, name)
        start = {"type": "content_block_start", "index": self._num_blocks, "content_block": block}
        return _event(b"content_block_start", start)

    def _closed(self) -> bytes:
        if self._open is None:
            return b""
        events = b""
        if self._open == "thinking":
            delta = {"type": "signature_delta", "signature": _SIGNATURE}
            signed = {"type": "content_block_delta", "index": self._num_blocks, "delta": delta}
            events = _event(b"content_block_delta", signed)
        events += _event(b"content_block_stop", {"type": "content_block_stop", "index": self._num_blocks})
        self._open = None
        self._num_blocks += 1
        return events

    def _more_of_call(self, delta: CallDelta) -> bytes:
        events = b""
        if delta.id is not None:
            name = self._origin(delta.name or "").name
            events = self._closed()
            events += self._opened("tool_use", {"type": "tool_use", "id": delta.id, "name": name, "input": {}})
        if delta.arguments:
            events += self._delta + json_bytes(delta.arguments) + b"}}\n\n"
        return events


_DELTAS = {
    "text": (b"text_delta", b"text"),
    "thinking": (b"thinking_delta", b"thinking"),
    "tool_use": (b"input_json_delta", b"partial_json"),
}


def _event(name: bytes, data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, json_bytes(data))


def _arguments(text: str) -> dict[str, Any]:
    """An object; of a call that was cut off, whose JSON is torn, an empty one."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _usage(work: Work) -> dict[str, Any]:
    """There, the tokens of a prompt are those that were not cached."""
    num_cached = work.num_cached_tokens
    num_prompt = sum(len(prompt.token_ids) for prompt in work.prompts)
    return {
        "input_tokens": num_prompt - num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
        "output_tokens": work.num_completion_tokens,
    }
