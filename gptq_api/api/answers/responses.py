"""Answers of the Responses API: an object of items, or events that tell how they come to be."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sse_starlette import ServerSentEvent

from gptq_api.api.answers.choice import Piece
from gptq_api.api.answers.encoding import json_bytes
from gptq_api.api.answers.formats import Call, Told
from gptq_api.api.answers.logprobs import TokenEntry
from gptq_api.api.answers.work import Work
from gptq_api.api.errors import ApiError
from gptq_api.api.tool_names import Origin, custom_input
from gptq_api.text.parts import CallDelta

Item = dict[str, Any]


class ResponsesShape:
    """One answer. A delta is a template of its item around one JSON string and a number."""

    ping = ServerSentEvent(comment="ping", sep="\n")

    def __init__(
        self,
        echoed: Mapping[str, Any],
        origin: Callable[[str], Origin],
        logprobs: Callable[[list[TokenEntry]], list[dict[str, Any]]] | None,
    ) -> None:
        """`echoed`: fields of the request that the answer repeats; `origin`: the tool behind a name that the model
        used; `logprobs`: spells them, None if nobody asked."""
        self._echoed = echoed
        self._origin = origin
        self._logprobs = logprobs
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._number = 0
        self._output: list[Item] = []
        """items that are complete"""
        self._open: Item | None = None
        self._arguments = ""
        """of the call that is open"""
        self._delta = b""
        """what an event with more of the open item begins with"""
        self._entries: list[dict[str, Any]] = []
        """log-probabilities of the open message"""
        self._finish_reason: str | None = None

    def begin(self, work: Work) -> bytes:
        response = json_bytes(self._object("in_progress", [], None))
        return self._event(b"response.created", b'"response":' + response) + self._event(
            b"response.in_progress", b'"response":' + response
        )

    def piece(self, work: Work, piece: Piece) -> bytes:
        events = b""
        if piece.reasoning:
            events += self._switched("reasoning")
            self._open["content"][0]["text"] += piece.reasoning  # type: ignore[index]
            events += self._delta + b"%b,%b" % (json_bytes(piece.reasoning), self._numbered())
        if piece.text or (self._logprobs is not None and piece.entries and not piece.calls):
            events += self._switched("message")
            events += self._more_text(piece)
        for delta in piece.calls:
            events += self._more_of_call(delta)
        if piece.finish_reason is not None:
            self._finish_reason = piece.finish_reason
            if self._open is None and not self._output:
                events += self._switched("message")  # an answer without a word is an empty message
            events += self._closed()
        return events

    def end(self, work: Work) -> bytes:
        status = "incomplete" if self._finish_reason == "length" else "completed"
        response = self._object(status, self._output, _usage(work))
        return self._event(b"response." + status.encode(), b'"response":' + json_bytes(response))

    def failed(self, work: Work, error: ApiError) -> bytes:
        events = self._closed(cut=True)
        response = self._object("failed", self._output, _usage(work))
        response["error"] = {"code": "server_error", "message": error.error["message"]}
        return events + self._event(b"response.failed", b'"response":' + json_bytes(response))

    def whole(self, work: Work, told: Sequence[Told]) -> dict[str, Any]:
        answer = told[0]
        cut = answer.finish_reason == "length"
        items = [_reasoning(answer.reasoning)] if answer.reasoning else []
        if answer.text or not answer.calls:
            entries = [] if self._logprobs is None else self._logprobs(answer.entries)
            items.append(_message(answer.text, entries))
        items += [self._call(call) for call in answer.calls]
        for item in items:
            item["status"] = "completed"
        if cut:
            items[-1]["status"] = "incomplete"
        return self._object("incomplete" if cut else "completed", items, _usage(work))

    def _object(self, status: str, output: list[Item], usage: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **self._echoed,
            "output": output,
            "usage": usage,
        }

    def _event(self, name: bytes, fields: bytes) -> bytes:
        return b'event: %b\ndata: {"type":"%b",%b,%b' % (name, name, fields, self._numbered())

    def _numbered(self) -> bytes:
        """The end of every event."""
        self._number += 1
        return b'"sequence_number":%d}\n\n' % (self._number - 1)

    def _begun(self, name: bytes, place: bytes) -> bytes:
        """Of deltas of the open item, up to their text."""
        return b'event: %b\ndata: {"type":"%b",%b,"delta":' % (name, name, place)

    def _switched(self, kind: str) -> bytes:
        """Events up to where an item of this type is open."""
        if self._open is not None and self._open["type"] == kind:
            return b""
        events = self._closed()
        item = _message("", []) if kind == "message" else _reasoning("")
        events += self._opened(item)
        place = self._place() + b',"content_index":0'
        self._delta = self._begun(_DELTAS[kind], place)
        part = json_bytes(item["content"][0])
        return events + self._event(b"response.content_part.added", place + b',"part":' + part)

    def _opened(self, item: Item) -> bytes:
        self._open = item
        self._entries = []
        first = {**item, "content": []} if "content" in item else item
        return self._event(b"response.output_item.added", self._indexed() + b',"item":' + json_bytes(first))

    def _indexed(self) -> bytes:
        return b'"output_index":%d' % len(self._output)

    def _place(self) -> bytes:
        assert self._open is not None
        return b'"item_id":"%b",' % self._open["id"].encode() + self._indexed()

    def _more_text(self, piece: Piece) -> bytes:
        assert self._open is not None
        self._open["content"][0]["text"] += piece.text
        told = b"[]"
        if self._logprobs is not None and piece.entries:
            entries = self._logprobs(piece.entries)
            self._entries += entries
            told = json_bytes(entries)
        return self._delta + b'%b,"logprobs":%b,%b' % (json_bytes(piece.text), told, self._numbered())

    def _more_of_call(self, delta: CallDelta) -> bytes:
        events = b""
        if delta.id is not None:
            events = self._closed() + self._opened(self._call(Call(delta.id, delta.name or "")))
            self._arguments = ""
            self._delta = self._begun(b"response.function_call_arguments.delta", self._place())
        assert self._open is not None
        self._arguments += delta.arguments
        if delta.arguments and self._open["type"] == "function_call":
            events += self._delta + b"%b,%b" % (json_bytes(delta.arguments), self._numbered())
        return events

    def _call(self, call: Call) -> Item:
        origin = self._origin(call.name)
        item: Item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress"}
        if origin.custom:
            item |= {"id": f"ctc_{uuid.uuid4().hex}", "type": "custom_tool_call"}
            item |= {"input": custom_input(call.arguments) if call.arguments else ""}
        else:
            item |= {"arguments": call.arguments}
        item |= {"call_id": call.id, "name": origin.name}
        return item if origin.namespace is None else {**item, "namespace": origin.namespace}

    def _closed(self, *, cut: bool = False) -> bytes:
        """The events that end the open item, if there is one."""
        item, place = self._open, b""
        if item is None:
            return b""
        place = self._place()
        item["status"] = "incomplete" if cut or self._finish_reason == "length" else "completed"
        if item["type"] == "function_call":
            item["arguments"] = self._arguments
            done = b',"arguments":' + json_bytes(self._arguments)
            events = self._event(b"response.function_call_arguments.done", place + done)
        elif item["type"] == "custom_tool_call":
            item["input"] = custom_input(self._arguments)
            text = json_bytes(item["input"])
            events = self._event(b"response.custom_tool_call_input.delta", place + b',"delta":' + text)
            events += self._event(b"response.custom_tool_call_input.done", place + b',"input":' + text)
        else:
            place += b',"content_index":0'
            part = item["content"][0]
            done = b',"text":' + json_bytes(part["text"])
            if item["type"] == "message":
                part["logprobs"] = self._entries
                done += b',"logprobs":' + json_bytes(self._entries)
            events = self._event(_DONES[item["type"]], place + done)
            events += self._event(b"response.content_part.done", place + b',"part":' + json_bytes(part))
        events += self._event(b"response.output_item.done", self._indexed() + b',"item":' + json_bytes(item))
        self._output.append(item)
        self._open = None
        return events


_DELTAS = {"message": b"response.output_text.delta", "reasoning": b"response.reasoning_text.delta"}
_DONES = {"message": b"response.output_text.done", "reasoning": b"response.reasoning_text.done"}


def _message(text: str, entries: list[dict[str, Any]]) -> Item:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": entries}
    head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "status": "in_progress", "role": "assistant"}
    return {**head, "content": [part]}


def _reasoning(text: str) -> Item:
    part = {"type": "reasoning_text", "text": text}
    head = {"id": f"rs_{uuid.uuid4().hex}", "type": "reasoning", "status": "in_progress"}
    return {**head, "summary": [], "content": [part]}


def _usage(work: Work) -> dict[str, Any]:
    counts: dict[str, Any] = work.usage()
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": counts["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": counts.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
        },
        "total_tokens": counts["total_tokens"],
    }
