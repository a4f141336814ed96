"""What a model's text is made of, once it is read: words for the user, thoughts, calls of tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gptq_api.text.stream import StopScan


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

    def __iadd__(self, more: Parts) -> Parts:
        self.reasoning += more.reasoning
        self.content += more.content
        self.calls += more.calls
        return self

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


class Reader(Protocol):
    """Reads the text of one choice as it comes. What it returned is never taken back."""

    has_calls: bool
    """whether a call was begun, which makes "tool_calls" of the finish reason "stop" """
    thinking: bool
    """whether what comes next belongs to the thoughts"""

    def push(self, text: str) -> Parts:
        """What is certain by now."""

    def finish(self) -> Parts:
        """What was held back, when the text has ended."""


class StoppedReader:
    """A reader, and stop strings, which count in the content alone: not in thoughts, and not in a call, whose arguments
    they would leave as torn JSON."""

    def __init__(self, reader: Reader, stop: Sequence[str], include_stop: bool = False) -> None:
        self._reader = reader
        self._scan = StopScan(stop, include_stop)
        self._surplus = 0

    @property
    def has_calls(self) -> bool:
        return self._reader.has_calls

    @property
    def thinking(self) -> bool:
        return self._reader.thinking

    @property
    def stop_string(self) -> str | None:
        """The one that was met."""
        return self._scan.met

    @property
    def stopped(self) -> bool:
        """A stop string was met; nothing is pushed from then on."""
        return self._scan.met is not None

    @property
    def num_surplus(self) -> int:
        """Characters of the content from the stop string on, which are not shown."""
        return self._scan.num_surplus

    def push(self, text: str) -> Parts:
        return self._scanned(self._reader.push(text))

    def finish(self) -> Parts:
        """Nothing is left after a stop string."""
        if self.stopped:
            return Parts()
        parts = self._scanned(self._reader.finish())
        if not self.stopped:
            parts.content += self._scan.finish()
        return parts

    def _scanned(self, parts: Parts) -> Parts:
        if parts.content:
            parts.content = self._scan.push(parts.content)
            if self.stopped:
                parts.calls = []
        if parts.calls and not self.stopped:  # no stop string goes on behind a call
            parts.content += self._scan.finish()
        return parts
