"""The lines of a batch's input, as OpenAI has them: one request each, and what is wrong with them by its line.

{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
"""what a line may ask"""
MAX_LINES = 50_000
MAX_CUSTOM_ID = 512
MAX_TOLD = 100
"""errors of one file"""
_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(slots=True, frozen=True)
class InputLine:
    number: int
    """counts from 1"""
    offset: int
    size: int
    """in bytes, with what ends it"""
    custom_id: str
    url: str


@dataclass(slots=True, frozen=True)
class LineError:
    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def told(self) -> dict[str, Any]:
        """As a batch has it in `errors.data`."""
        return {"code": self.code, "message": self.message, "param": self.param, "line": self.line}

    def __str__(self) -> str:
        return self.message if self.line is None else f"line {self.line}: {self.message}"


class _Wrong(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


@dataclass(slots=True)
class Input:
    """What a file holds: its lines, or what is wrong with it."""

    lines: list[InputLine] = field(default_factory=list)
    errors: list[LineError] = field(default_factory=list)


def read_input(
    path: Path,
    endpoint: str | None,
    max_line_bytes: int,
    stop: Callable[[], bool] = lambda: False,
    max_lines: int | None = MAX_LINES,
) -> Input:
    """`endpoint`: what all lines have to ask; None: any of ENDPOINTS. `max_line_bytes`: of one line. `stop`: whether
    nobody wants to know any more. Raises OSError."""
    found, known = Input(), dict[str, int]()
    with path.open("rb") as file:
        for number, offset, data in _split(file, max_line_bytes):
            if stop() or len(found.errors) >= MAX_TOLD:
                break
            try:
                if max_lines is not None and len(found.lines) >= max_lines:
                    raise _Wrong("too_many_tasks", f"A batch holds at most {max_lines} requests; split the file.")
                custom_id, url = _checked(data, endpoint, max_line_bytes)
                if (other := known.setdefault(custom_id, number)) != number:
                    raise _Wrong(
                        "duplicate_custom_id", f"The custom_id is that of line {other}; each has its own.", "custom_id"
                    )
                found.lines.append(InputLine(number, offset, len(data), custom_id, url))
            except _Wrong as wrong:
                found.errors.append(LineError(wrong.code, wrong.message, number, wrong.param))
                if wrong.code == "too_many_tasks":
                    break
    if not found.lines and not found.errors:
        found.errors.append(LineError("empty_file", "The file holds no request: it needs one JSON object a line."))
    return found


def _split(file: BinaryIO, max_line_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """(number, offset, bytes) of each line that is not blank. Of one that is too long its beginning, which is longer
    than allowed as well."""
    number = offset = 0
    while data := file.readline(max_line_bytes + 2):
        number += 1
        size = len(data)
        if not data.endswith(b"\n"):
            while rest := file.readline(2**20):
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
        if data.strip():
            yield number, offset, data
        offset += size


def _checked(data: bytes, endpoint: str | None, max_line_bytes: int) -> tuple[str, str]:
    """(custom_id, url) of a line. Raises _Wrong."""
    if len(data.rstrip(b"\r\n")) > max_line_bytes:
        raise _Wrong("line_too_long", f"This line is longer than {max_line_bytes} bytes, the limit of this server.")
    try:
        line = msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _Wrong("invalid_json_line", f"This line is not parseable as valid JSON: {error}.") from None
    if not isinstance(line, dict):
        raise _Wrong("invalid_json_line", "This line is not a JSON object.")
    for name in _FIELDS:
        if line.get(name) is None:
            raise _Wrong("missing_required_parameter", f"Missing required parameter: '{name}'.", name)
    if unknown := next((name for name in line if name not in _FIELDS), None):
        raise _Wrong(
            "unknown_parameter", f"Unknown parameter: '{unknown[:100]}'; its fields belong into 'body'.", unknown[:100]
        )
    custom_id, method, url, body = (line[name] for name in _FIELDS)
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise _Wrong("invalid_value", f"'custom_id' must be a string of 1 to {MAX_CUSTOM_ID} characters.", "custom_id")
    if method != "POST":
        raise _Wrong("invalid_method", "'method' must be 'POST'.", "method")
    if url not in ENDPOINTS:
        raise _Wrong("invalid_url", f"'url' must be one of {', '.join(ENDPOINTS)}.", "url")
    if endpoint is not None and url != endpoint:
        raise _Wrong("mismatched_url", f"'url' is {url}, and the endpoint of the batch {endpoint}.", "url")
    if not isinstance(body, dict):
        raise _Wrong("invalid_value", "'body' must be an object.", "body")
    if body.get("stream"):
        raise _Wrong("invalid_value", "'stream' has no place in a batch; leave it out.", "body.stream")
    return custom_id, url


class _Body(msgspec.Struct):
    body: msgspec.Raw


def body_of(line: bytes) -> bytes:
    """The body of a line that was found right, as it stands there."""
    return bytes(msgspec.json.decode(line.removeprefix(b"\xef\xbb\xbf"), type=_Body).body)
