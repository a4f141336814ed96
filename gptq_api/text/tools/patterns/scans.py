"""Arguments as they come, character by character, and where they end."""

from __future__ import annotations

import json
from typing import Protocol

_LITERALS = {"True": "true", "False": "false", "None": "null"}


class Scan(Protocol):
    """The arguments of one call."""

    done: bool

    def push(self, text: str) -> tuple[str, int]:
        """JSON that may be told, and how many characters of the text belong to the arguments: all, until `done`."""


class ObjectScan:
    """A JSON object, which is told as it stands."""

    def __init__(self) -> None:
        self.done = False
        self._depth = 0
        self._in_string = self._escaped = False

    def push(self, text: str) -> tuple[str, int]:
        for i, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.done = True
                    return text[: i + 1], i + 1
        return text, len(text)


class KeywordScan:
    """Python's keyword arguments up to the closing parenthesis, told as a JSON object: `a=1, b='x')` -> `{"a": 1, "b":
    "x"}`. Values may be JSON's or Python's."""

    def __init__(self) -> None:
        self.done = False
        self._name = ""
        self._word = ""  # of a value: what may become True, False or None
        self._in_value = self._escaped = self._any = self._whole = False
        self._quote = ""
        self._depth = 0

    def push(self, text: str) -> tuple[str, int]:
        told = ""
        for i, char in enumerate(text):
            told += self._take(char)
            if self.done:
                return told, i + 1
        return told, len(text)

    def _take(self, char: str) -> str:
        if not self._in_value:
            return self._outside(char)
        if self._quote:
            return self._in_string(char)
        if char.isalnum() or char in "_.+-":
            self._word += char
            return ""
        word, self._word = _LITERALS.get(self._word, self._word), ""
        if char in "\"'":
            self._quote = char
            return word + '"'
        if self._depth == 0 and char in ",)":
            self._in_value = False
            return word + self._ends(char)
        self._depth += (char in "[{") - (char in "]}")
        return word + char

    def _outside(self, char: str) -> str:
        """Between values: a name, and what stands before it."""
        if char == "=":
            name, self._name = self._name.strip(), ""
            self._in_value = True
            told = ("{" if not self._any else ", ") + json.dumps(name) + ": "
            self._any = True
            return told
        if self._name == "**" and char == "{":  # an object instead of names
            self._any = self._whole = self._in_value = True
            self._name, self._depth = "", 1
            return "{"
        if char in ",)":
            return self._ends(char)
        self._name += char if not (char.isspace() and not self._name) else ""
        return ""

    def _in_string(self, char: str) -> str:
        if self._escaped:
            self._escaped = False
            return "'" if char == "'" else "\\" + char if char in '"\\/bfnrtu' else "\\\\" + char
        if char == "\\":
            self._escaped = True
            return ""
        if char == self._quote:
            self._quote = ""
            return '"'
        return json.dumps(char, ensure_ascii=False)[1:-1]

    def _ends(self, char: str) -> str:
        if char == ",":
            return ""
        self.done = True
        if not self._any:
            return "{}"
        return "" if self._whole else "}"
