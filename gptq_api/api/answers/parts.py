"""What a model's text is made of, once it is read: words for the reader, thoughts, calls of tools."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True, frozen=True)
class CallDelta:
    """More of a tool call."""

    index: int
    """which call of the answer, from 0"""
    id: str | None
    """with the first delta of a call, like the name; None afterwards"""
    name: str | None
    arguments: str
    """the JSON text that goes on where the delta before ended; together a JSON object"""


@dataclass(slots=True)
class Parts:
    """What a piece of text brought, in this order."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class Reader(Protocol):
    """Reads the text of one choice as it comes. What it returned is never taken back."""

    has_calls: bool
    """whether a call was begun, which makes "tool_calls" of the finish reason "stop"."""

    def push(self, text: str) -> Parts:
        """What is certain by now."""

    def finish(self) -> Parts:
        """What was held back, when the text has ended."""
