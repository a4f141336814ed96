"""JSON as every client can read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import Response


def json_bytes(value: Any) -> bytes:
    """UTF-8 JSON on one line, whoever splits it: U+2028, U+2029 and U+0085 are escaped, since they end a line for some
    readers (httpx's iter_lines) in the middle of the data."""
    data = msgspec.json.encode(value)
    if b"\xe2\x80" in data or b"\xc2\x85" in data:
        data = data.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
        data = data.replace(b"\xc2\x85", b"\\u0085")
    return data


def json_response(value: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    return Response(json_bytes(value), status, headers, media_type="application/json")
