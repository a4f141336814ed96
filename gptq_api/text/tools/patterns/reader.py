"""Finds calls of tools in an answer as it comes, by the pattern that its family of models writes them in."""

from __future__ import annotations

import secrets
import string
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from gptq_api.text.parts import CallDelta, Parts
from gptq_api.text.tools.patterns.scans import KeywordScan, ObjectScan, Scan
from gptq_api.text.tools.patterns.spelling import Item, Spelling, items

MAX_NAME = 128
_MAX_SPACE = 64
_NAME = frozenset(string.ascii_letters + string.digits + "_-.")
_ALPHABET = string.ascii_letters + string.digits


def new_call_id() -> str:
    """Another one for every call."""
    return "call_" + "".join(secrets.choice(_ALPHABET) for _ in range(24))


class Match(NamedTuple):
    """How a text goes with a pattern."""

    state: Literal["no", "partly", "wholly"]
    """"partly": the text ends before the pattern does"""
    end: int = 0
    """characters of the text that belong to the pattern"""
    name: str = ""
    num_items: int = 0
    """elements of the pattern that are there as a whole"""


def match(pattern: Sequence[Item], text: str, at: int = 0) -> Match:
    """`pattern` up to its arguments, of which nothing is taken."""
    name = ""
    for number, (kind, literal) in enumerate(pattern):
        if kind == "arguments":
            return Match("wholly", at, name, number)
        if kind == "space":
            begin = at
            while at < len(text) and text[at].isspace():
                at += 1
            if at - begin > _MAX_SPACE:
                return Match("no")
        elif kind == "name":
            begin = at
            while at < len(text) and text[at] in _NAME:
                at += 1
            name = text[begin:at]
            if at == len(text) and len(name) <= MAX_NAME:
                return Match("partly", at, name, number)
            if not 0 < len(name) <= MAX_NAME:
                return Match("no")
        elif text.startswith(literal, at):
            at += len(literal)
        else:
            partly = len(text) - at < len(literal) and literal.startswith(text[at:])
            return Match("partly" if partly else "no", len(text), name, number)
    return Match("wholly", at, name, len(pattern))


class CallReader:
    """A Reader of one answer.

    Text is held back while it may be the beginning of a call, and white space while a call may follow it: what stands
    before a call ends without it.
    """

    thinking = False

    def __init__(self, spelling: Spelling, names: Collection[str]) -> None:
        """`names`: of the functions."""
        self.has_calls = False
        self._names = names
        self._keywords = spelling.keywords
        self._opening, self._between = items(spelling.opening), items(spelling.between)
        call = items(spelling.call)
        inside = next(i for i, (kind, _) in enumerate(call) if kind == "arguments")
        self._head, self._tail = call[: inside + 1], call[inside + 1 :]
        self._closing = items(spelling.closing)
        self._triggers = [trigger for trigger in (spelling.trigger, spelling.also) if trigger]
        self._also = spelling.also
        self._anywhere = bool(spelling.trigger)
        self._lead = spelling.lead
        self._state: Literal["begin", "text", "head", "arguments", "tail", "between", "end"] = "begin"
        self._text = spelling.prompted
        """what is not told yet"""
        self._scan: Scan = ObjectScan()
        self._num_calls = 0

    def push(self, text: str) -> Parts:
        self._text += text
        parts = Parts()
        while self._text and self._step(parts):
            pass
        return parts

    def finish(self) -> Parts:
        """A call that was cut before its arguments is not told."""
        parts = Parts()
        text, self._text = self._text, ""
        if self._state == "begin" and self._lead:
            text = "" if self._lead.startswith(text) else text.removeprefix(self._lead)
        if self._state in ("begin", "text") and (text.strip() or not self.has_calls):
            parts.content = text
        self._state = "end"
        return parts

    def _step(self, parts: Parts) -> bool:
        """Take something of the text. False where more of it has to come first."""
        match self._state:
            case "begin":
                return self._begin()
            case "text":
                return self._plain(parts)
            case "head":
                return self._begin_call(parts, [*self._opening, *self._head] if not self._num_calls else self._head)
            case "arguments":
                told, used = self._scan.push(self._text)
                self._text = self._text[used:]
                if told:
                    parts.calls.append(CallDelta(self._num_calls - 1, None, None, told))
                if self._scan.done:
                    self._state = "tail"
                return True
            case "tail":
                return self._end_call()
            case "between":
                return self._next_call(parts)
            case "end":
                self._text = ""
                return False

    def _begin(self) -> bool:
        """What an answer begins with decides whether it is a call, where nothing else can begin one."""
        text = self._text
        start = len(text) - len(text.lstrip())
        if start == len(text):
            return False
        if not self._anywhere or self._lead:
            head = [*self._opening, *self._head]
            found = match(head, text, start)
            if found.state == "partly" and found.name and not self._known(found, head):
                found = Match("no")
            if found.state == "wholly" and found.name in self._names:
                self._text, self._state = text[start:], "head"
                return True
            if found.state == "partly":
                return False
        if self._lead:
            if self._lead.startswith(text):
                return False
            self._text = text.removeprefix(self._lead)
        self._state = "text"
        return True

    def _known(self, found: Match, head: list[Item]) -> bool:
        """Whether a name that is there so far may become one of a function."""
        if found.num_items < len(head) and head[found.num_items][0] == "name":
            return any(name.startswith(found.name) for name in self._names)
        return found.name in self._names

    def _plain(self, parts: Parts) -> bool:
        text = self._text
        places = [(at, trigger) for trigger in self._triggers if (at := text.find(trigger)) >= 0]
        if places:
            at, trigger = min(places)
            parts.content += text[:at].rstrip()
            self._text = text[at:].removeprefix(self._also) if trigger == self._also else text[at:]
            self._state = "head"
            return True
        keep = max((_overlap(text, trigger) for trigger in self._triggers), default=0)
        if self._triggers:
            keep = len(text) - len(text[: len(text) - keep].rstrip())
        parts.content += text[: len(text) - keep]
        self._text = text[len(text) - keep :]
        return False

    def _begin_call(self, parts: Parts, pattern: list[Item]) -> bool:
        text = self._text
        start = len(text) - len(text.lstrip())
        found = match(pattern, text, start)
        if found.state == "partly":
            return False
        begins = found.state == "wholly" and found.name in self._names
        if begins and not self._keywords:
            if found.end == len(text):
                return False
            begins = text[found.end] == "{"
        if not begins:  # no call, whatever it looked like
            skipped = max(start + 1, next((len(t) for t in self._triggers if text.startswith(t)), 0))
            parts.content += text[:skipped]
            self._text, self._state = text[skipped:], "text"
            return True
        self.has_calls = True
        parts.calls.append(CallDelta(self._num_calls, new_call_id(), found.name, ""))
        self._num_calls += 1
        self._scan = KeywordScan() if self._keywords else ObjectScan()
        self._text, self._state = text[found.end :], "arguments"
        return True

    def _end_call(self) -> bool:
        found = match(self._tail, self._text)
        if found.state == "partly":
            return False
        self._text = self._text[found.end :] if found.state == "wholly" else self._text
        self._state = "between"
        return True

    def _next_call(self, parts: Parts) -> bool:
        pattern = [*self._between, *self._head]
        found = match(pattern, self._text)
        if found.state == "wholly" and found.name in self._names:
            return self._begin_call(parts, pattern)
        if found.state == "partly":
            return False
        closing = match(self._closing, self._text) if self._closing else Match("no")
        if closing.state == "partly":
            return False
        if closing.state == "wholly":
            self._text = self._text[closing.end :]
        if not self._text.strip():
            return False
        self._state = "text"
        return True


def _overlap(text: str, trigger: str) -> int:
    """How many characters at the end of the text are a beginning of the trigger."""
    for length in range(min(len(text), len(trigger) - 1), 0, -1):
        if trigger.startswith(text[-length:]):
            return length
    return 0
