"""Finds thoughts and tool calls in an answer's text as it comes."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from typing import Literal

import regex

from gptq_api.text.parts import CallDelta, Parts
from gptq_api.text.tools.layouts import CallLayout
from gptq_api.text.tools.patterns.scans import ObjectScan

THINK, END_THINK = "<think>", "</think>"
_HEAD = regex.compile(r'\{[ \n]*"name"[ \n]*:[ \n]*"')
"""of a call, up to its name"""
_CALL = regex.compile(_HEAD.pattern + r'([^"]*)"[ \n]*,[ \n]*"(?:arguments|parameters)"[ \n]*:[ \n]*(?=\{)')
"""up to its arguments"""
_ID_CHARACTERS = string.ascii_letters + string.digits


def new_call_id(layout: CallLayout) -> str:
    """Different for every call."""
    return layout.id_prefix + "".join(secrets.choice(_ID_CHARACTERS) for _ in range(layout.id_length))


class AnswerReader:
    """A Reader for one choice. What may be the beginning of a thought or a call is held back, and nothing else.

    Calls are written by a grammar (`tools/grammar.py`): their text is as the layout says, but for white space, unless
    it ends early.
    """

    def __init__(
        self,
        layout: CallLayout | None,
        thinks: Literal["", "may", "does"] = "",
        new_id: Callable[[], str] | None = None,
    ) -> None:
        """`layout`: None where there are no tools; `thinks`: whether the text may begin with <think>, or goes on behind
        one that the prompt ends with."""
        self._layout = layout
        self._new_id = new_id or (lambda: new_call_id(layout) if layout is not None else "")
        self.has_calls = False
        self.thinking = thinks == "does"
        self._state: Literal["start", "thoughts", "gap", "first", "content", "head", "arguments"]
        self._state = {"": "first", "may": "start", "does": "thoughts"}[thinks]  # type: ignore[assignment]
        self._held = ""
        self._num_calls = 0
        self._arguments_scan = ObjectScan()

    def push(self, text: str) -> Parts:
        """What is certain by now."""
        self._held += text
        parts = Parts()
        while self._step(parts):
            pass
        return parts

    def finish(self) -> Parts:
        """What was held back, when the text has ended. A call of which not even the name was complete is left out."""
        held, self._held = self._held, ""
        if self._state == "thoughts":
            return Parts(reasoning=held)
        if self._state in ("head", "gap", "arguments"):
            return Parts()
        return Parts(content=held)

    def _step(self, parts: Parts) -> bool:
        """One transition; whether another may follow at once."""
        return bool(getattr(self, f"_{self._state}")(parts))

    def _start(self, parts: Parts) -> bool:
        text = self._held.lstrip()
        if text.startswith(THINK):
            self._held, self._state, self.thinking = text[len(THINK) :], "thoughts", True
            return True
        if THINK.startswith(text):
            return False
        self._state = "first"
        return True

    def _thoughts(self, parts: Parts) -> bool:
        text, found, rest = self._held.partition(END_THINK)
        if not found:
            keep = _overlap(self._held, END_THINK)
            parts.reasoning += self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
            return False
        parts.reasoning += text
        self._held, self._state, self.thinking = rest, "gap", False
        return True

    def _gap(self, parts: Parts) -> bool:
        """The line breaks between thoughts and answer belong to neither."""
        self._held = self._held.lstrip("\n")
        if not self._held:
            return False
        self._state = "first"
        return True

    def _first(self, parts: Parts) -> bool:
        """Where a call may begin without a mark."""
        if self._layout is not None and not self._layout.begin:
            if _HEAD.match(self._held):
                self._state = "head"
                return True
            if not self._held or _HEAD.fullmatch(self._held, partial=True):
                return False
        self._state = "content"
        return True

    def _content(self, parts: Parts) -> bool:
        begin = "" if self._layout is None else self._layout.begin
        if not begin:
            parts.content += self._held
            self._held = ""
            return False
        text, found, rest = self._held.partition(begin)
        if found:
            parts.content += text
            self._held, self._state = rest, "head"
            return True
        keep = _overlap(self._held, begin)
        parts.content += self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return False

    def _head(self, parts: Parts) -> bool:
        """Behind `begin` or a call, up to where the next call's arguments begin."""
        found = _CALL.search(self._held)
        if found is None:
            return False
        parts.calls.append(CallDelta(self._num_calls, self._new_id(), found[1], ""))
        self._num_calls += 1
        self.has_calls = True
        self._held, self._state = self._held[found.end() :], "arguments"
        self._arguments_scan = ObjectScan()
        return True

    def _arguments(self, parts: Parts) -> bool:
        told, used = self._arguments_scan.push(self._held)
        self._more(parts, told)
        self._held = self._held[used:]
        if self._arguments_scan.done:
            self._state = "head"
        return self._arguments_scan.done

    def _more(self, parts: Parts, arguments: str) -> None:
        if arguments:
            parts.calls.append(CallDelta(self._num_calls - 1, None, None, arguments))


def _overlap(text: str, mark: str) -> int:
    """How much of the text's end may be the beginning of the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)
