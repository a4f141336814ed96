"""How each endpoint spells its answers: a whole one, or the events of a stream.

A chunk is a per-request template around one JSON string, so that nothing is built per token but that string.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from sse_starlette import ServerSentEvent

from gptq_api.api.answers.choice import Piece
from gptq_api.api.answers.encoding import json_bytes
from gptq_api.api.answers.logprobs import TokenEntry
from gptq_api.api.answers.prompt_logprobs import Scoring
from gptq_api.api.answers.work import Work
from gptq_api.api.errors import ApiError
from gptq_api.api.service import Service
from gptq_api.text.parts import CallDelta

Logprobs = Callable[[list[TokenEntry]], dict[str, Any]]
DONE = b"data: [DONE]\n\n"


@dataclass(slots=True, frozen=True)
class Head:
    """What is the same in every chunk of a stream."""

    id: str
    created: int
    """Unix time, seconds"""
    model: str
    system_fingerprint: str
    tells_tier: bool = False
    """whether the answer says in which service tier it was made, as it does to those who chose one"""

    @classmethod
    def new(cls, prefix: str, service: Service, service_tier: str | None = None) -> Head:
        """`prefix`: what the id begins with; `service_tier`: the one asked for."""
        now, tells_tier = int(time.time()), service_tier is not None
        return cls(f"{prefix}-{uuid.uuid4().hex}", now, service.model_name, service.fingerprint, tells_tier)

    def fields(self, kind: str) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }
        return {**fields, "service_tier": "default"} if self.tells_tier else fields


class UsageEvents(NamedTuple):
    """Where a stream tells the token counts."""

    at_end: bool
    """in a last chunk, which has no choice"""
    in_chunks: bool
    """those so far in every chunk"""


@dataclass(slots=True)
class Call:
    """A tool call."""

    id: str
    name: str
    arguments: str = ""
    """a JSON object, unless the answer was cut"""


@dataclass(slots=True)
class Told:
    """All that was told of one choice."""

    text: str = ""
    entries: list[TokenEntry] = field(default_factory=list)
    finish_reason: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.entries += piece.entries
        self.finish_reason = piece.finish_reason or ""
        self.reasoning += piece.reasoning
        for delta in piece.calls:
            if delta.id is not None:
                self.calls.append(Call(delta.id, delta.name or ""))
            self.calls[delta.index].arguments += delta.arguments


def _with_field(told: bytes, name: bytes, value: Any) -> bytes:
    """`told`: JSON of an object."""
    return b'%b,"%b":%b}' % (told[:-1], name, json_bytes(value))


class Format(ABC):
    """A Shape of answers in choices. What an endpoint says of one choice is up to it; the frame around that is OpenAI's
    for all, and so is `[DONE]`, which comes after an error too."""

    ping = ServerSentEvent(comment="ping", sep="\n")
    kind: str
    chunk_kind: str
    prompt_by_choice = True
    """whether choices may have different prompts"""

    def __init__(self, head: Head, num_choices: int, usage: UsageEvents, logprobs: Logprobs | None) -> None:
        """`num_choices`: how many samples of each prompt are shown; `logprobs`: spells them, None if nobody asked."""
        self._head = head
        self._num_choices = num_choices
        self._usage_at_end, self._usage_in_chunks = usage
        self._logprobs = logprobs
        self._start = b"data: " + json_bytes(head.fields(self.chunk_kind))[:-1] + b',"choices":['
        self._end = b'],"usage":null}\n\n' if usage.at_end else b"]}\n\n"

    def begin(self, work: Work) -> bytes:
        end = self._with_usage(work) if self._usage_in_chunks else self._end
        if work.tells_ids:
            return b"".join([self._first_with_ids(choice.index, work, end) for choice in work.choices])
        firsts = [self.first(choice.index) for choice in work.choices]
        return b"".join([self._start + first + end for first in firsts if first])

    def piece(self, work: Work, piece: Piece) -> bytes:
        end = self._with_usage(work) if self._usage_in_chunks else self._end
        event = b""
        if work.tells_ids or piece.reasoning or piece.calls:
            parts = self.parts(piece) if piece.reasoning or piece.calls else [self.text(piece)] if piece.text else []
            if work.tells_ids:
                parts = [_with_field(part, b"token_ids", piece.choice.new_ids()) for part in parts]
            event = b"".join([self._start + part + end for part in parts])
        elif piece.text:
            event = self._start + self.text(piece) + end
        if piece.finish_reason is not None:
            last = self.last(piece)
            if work.tells_ids:
                last = _with_field(last, b"token_ids", piece.choice.new_ids())
            if (stop_reason := piece.choice.stop_reason) is not None:
                last = _with_field(last, b"stop_reason", stop_reason)
            event += self._start + last + end
        return event

    def end(self, work: Work) -> bytes:
        return self._start + self._with_usage(work) + DONE if self._usage_at_end else DONE

    def failed(self, work: Work, error: ApiError) -> bytes:
        return b"data: " + json_bytes({"error": error.error}) + b"\n\n" + DONE

    def whole(self, work: Work, told: Sequence[Told]) -> dict[str, Any]:
        """`told`: by choice."""
        choices = []
        for index, choice in enumerate(work.best(self._num_choices)):
            part = told[choice.index]
            logprobs = None if self._logprobs is None else self.logprobs(choice.index, part.entries)
            said: dict[str, Any] = {"logprobs": logprobs, "finish_reason": self.ended(part.finish_reason)}
            if choice.token_ids is not None:
                said["token_ids"] = choice.token_ids[: choice.num_tokens]
                if self.prompt_by_choice:
                    said["prompt_token_ids"] = work.prompt_of(choice.index).token_ids
            if choice.stop_reason is not None:
                said["stop_reason"] = choice.stop_reason
            choices.append({"index": index, **self.said(choice.index, part), **said})
        return {**self._head.fields(self.kind), "choices": choices, "usage": work.usage()}

    def _first_with_ids(self, index: int, work: Work, end: bytes) -> bytes:
        """The event that opens a choice; tells the ids of its prompt where the format has a place for them."""
        first = self.first(index)
        return self._start + first + end if first else b""

    @abstractmethod
    def first(self, index: int) -> bytes:
        """JSON of what opens a choice; b"" where nothing does."""

    @abstractmethod
    def text(self, piece: Piece) -> bytes:
        """JSON of a choice's new text."""

    @abstractmethod
    def last(self, piece: Piece) -> bytes:
        """JSON of why a choice ended. Holds log-probabilities only where tokens without text were left to tell."""

    @abstractmethod
    def said(self, index: int, told: Told) -> dict[str, Any]:
        """The field of a whole answer's choice that holds its text."""

    def parts(self, piece: Piece) -> list[bytes]:
        """JSON of a piece that holds thoughts or calls, in as many parts as it takes; only where answers have them."""
        raise NotImplementedError

    def ended(self, reason: str) -> str:
        """How a finish reason is spelled."""
        return reason

    def logprobs(self, index: int, entries: list[TokenEntry]) -> dict[str, Any]:
        """All log-probabilities of a choice."""
        assert self._logprobs is not None
        return self._logprobs(entries)

    def told(self, entries: list[TokenEntry]) -> bytes:
        """JSON of log-probabilities."""
        return b"null" if self._logprobs is None or not entries else json_bytes(self._logprobs(entries))

    def _with_usage(self, work: Work) -> bytes:
        return b'],"usage":' + json_bytes(work.usage()) + b"}\n\n"


class ChatFormat(Format):
    """A message of the assistant."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prompt_by_choice = False

    def __init__(
        self,
        head: Head,
        num_choices: int,
        usage: UsageEvents,
        logprobs: Logprobs | None,
        *,
        may_call: bool = False,
        call_ends_with: str = "tool_calls",
    ) -> None:
        """`may_call`: whether there are tools; `call_ends_with`: the finish reason of an answer that called some."""
        super().__init__(head, num_choices, usage, logprobs)
        self._opening = b"null" if may_call else b'""'
        self._call_ends_with = call_ends_with

    def _first_with_ids(self, index: int, work: Work, end: bytes) -> bytes:
        ids = json_bytes(work.prompt_of(index).token_ids)
        return self._start + self.first(index) + b'],"prompt_token_ids":' + ids + end.removeprefix(b"]")

    def first(self, index: int) -> bytes:
        """The role, once; no text, so that the first text marks the first token."""
        return b'{"index":%d,"delta":{"role":"assistant","content":%b},"logprobs":null,"finish_reason":null}' % (
            index,
            self._opening,
        )

    def text(self, piece: Piece) -> bytes:
        return b'{"index":%d,"delta":{"content":%b},"logprobs":%b,"finish_reason":null}' % (
            piece.choice.index,
            json_bytes(piece.text),
            self.told(piece.entries) if piece.entries else b"null",
        )

    def parts(self, piece: Piece) -> list[bytes]:
        """A delta for the thoughts, one for the text, one for each of the calls; log-probabilities are in the first."""
        deltas = [b'"reasoning_content":' + json_bytes(piece.reasoning)] if piece.reasoning else []
        if piece.text:
            deltas.append(b'"content":' + json_bytes(piece.text))
        deltas += [b'"tool_calls":[' + _call_delta(delta) + b"]" for delta in piece.calls]
        told = [self.told(piece.entries), *[b"null"] * len(deltas)]
        return [
            b'{"index":%d,"delta":{%b},"logprobs":%b,"finish_reason":null}' % (piece.choice.index, delta, entries)
            for delta, entries in zip(deltas, told, strict=False)
        ]

    def last(self, piece: Piece) -> bytes:
        shown = piece.text or piece.reasoning or piece.calls
        return b'{"index":%d,"delta":{},"logprobs":%b,"finish_reason":"%b"}' % (
            piece.choice.index,
            self.told([] if shown else piece.entries),
            self.ended(piece.finish_reason or "").encode(),
        )

    def said(self, index: int, told: Told) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if told.calls and not told.text else told.text,
            "refusal": None,
        }
        if told.reasoning:
            message["reasoning_content"] = told.reasoning
        if told.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in told.calls
            ]
        return {"message": message}

    def ended(self, reason: str) -> str:
        return self._call_ends_with if reason == "tool_calls" else reason

    def whole(self, work: Work, told: Sequence[Told]) -> dict[str, Any]:
        answer = super().whole(work, told)
        if work.scoring is not None:
            answer["prompt_logprobs"] = work.scoring.prompts[0].listed
        if work.tells_ids:
            answer["prompt_token_ids"] = work.prompts[0].token_ids
        return answer


def _call_delta(delta: CallDelta) -> bytes:
    arguments = json_bytes(delta.arguments)
    if delta.id is None:
        return b'{"index":%d,"function":{"arguments":%b}}' % (delta.index, arguments)
    return b'{"index":%d,"id":%b,"type":"function","function":{"name":%b,"arguments":%b}}' % (
        delta.index,
        json_bytes(delta.id),
        json_bytes(delta.name),
        arguments,
    )


class CompletionFormat(Format):
    """A text that goes on where the prompt ends, or (`echo`) begins with it; with the log-probabilities of both, where
    those of the answer were asked for."""

    kind = chunk_kind = "text_completion"

    def __init__(
        self,
        head: Head,
        num_choices: int,
        usage: UsageEvents,
        logprobs: Logprobs | None,
        echoes: Sequence[str],
        scoring: Scoring | None = None,
    ) -> None:
        """`echoes`: the text each choice begins with, or ""."""
        super().__init__(head, num_choices, usage, logprobs)
        self._echoes = echoes
        self._scored = [] if scoring is None else scoring.of_choice
        self._echoes_logprobs = scoring is not None and scoring.num_echoed is not None
        self._untold = set(range(len(echoes))) if self._echoes_logprobs else set()  # choices whose echo is to be told

    def _first_with_ids(self, index: int, work: Work, end: bytes) -> bytes:
        first = self.first(index) or b'{"index":%d,"text":"","logprobs":null,"finish_reason":null}' % index
        return self._start + _with_field(first, b"prompt_token_ids", work.prompt_of(index).token_ids) + end

    def first(self, index: int) -> bytes:
        """The echo, unless its log-probabilities come with it."""
        return self._echo(index) if self._echoes[index] and index not in self._untold else b""

    def piece(self, work: Work, piece: Piece) -> bytes:
        event = super().piece(work, piece)
        if self._untold and piece.choice.index in self._untold:
            self._untold.discard(piece.choice.index)
            end = self._with_usage(work) if self._usage_in_chunks else self._end
            event = self._start + self._echo(piece.choice.index) + end + event
        return event

    def _echo(self, index: int) -> bytes:
        told = json_bytes(self._scored[index].echo) if self._echoes_logprobs else b"null"
        echo = json_bytes(self._echoes[index])
        return b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":null}' % (index, echo, told)

    def logprobs(self, index: int, entries: list[TokenEntry]) -> dict[str, Any]:
        answer = super().logprobs(index, self._placed(index, entries))
        echo = self._scored[index].echo if self._echoes_logprobs else None
        return answer if echo is None else {name: echo[name] and echo[name] + answer[name] for name in answer}

    def _placed(self, index: int, entries: list[TokenEntry]) -> list[TokenEntry]:
        """Their offsets count from the beginning of the echo."""
        start = len(self._echoes[index]) if self._echoes_logprobs else 0
        return [replace(entry, text_offset=start + entry.text_offset) for entry in entries] if start else entries

    def text(self, piece: Piece) -> bytes:
        return b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":null}' % (
            piece.choice.index,
            json_bytes(piece.text),
            self.told(self._placed(piece.choice.index, piece.entries)) if piece.entries else b"null",
        )

    def last(self, piece: Piece) -> bytes:
        return b'{"index":%d,"text":"","logprobs":%b,"finish_reason":"%b"}' % (
            piece.choice.index,
            self.told([] if piece.text else self._placed(piece.choice.index, piece.entries)),
            (piece.finish_reason or "").encode(),
        )

    def said(self, index: int, told: Told) -> dict[str, Any]:
        said = {"text": self._echoes[index] + told.text}
        listed = self._scored[index].listed if self._scored else None
        return said if listed is None else {**said, "prompt_logprobs": listed}
