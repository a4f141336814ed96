"""What a route says about its answers: `@router.get("/version", **answers("Version"))`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import Response

from gptq_api.api.document.primitives import ref
from gptq_api.api.document.shapes import SHAPES

MEANING = {
    400: "The request is wrong: the error names the field and the remedy.",
    401: "No key was sent, or none that this server knows.",
    403: "The key's role does not allow it.",
    404: "That model is not served here, or there is no such thing of this key.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is compressed.",
    429: "The server, the caller's share of it or a limit of its key is full: try again after `retry-after` seconds.",
    500: "The model produced numbers that are not finite.",
    503: "The server is shutting down, or its engine is gone, being started again, or silent.",
    504: "The request's own timeout was over before the first token.",
    529: "The server is full: try again after `retry-after` seconds.",
}
BODY = (400, 408, 413, 415)
"""what can come of reading a body"""
WORK = (429, 503)
"""what can come of asking for a place"""
_SECONDS = {"schema": {"type": "integer", "minimum": 0}}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"www-authenticate": {"schema": {"type": "string"}}},
    429: {"retry-after": _SECONDS, "retry-after-ms": {"schema": {"type": "integer", "minimum": 0}}},
    503: {"retry-after": _SECONDS},
    504: {"x-should-retry": {"schema": {"type": "string", "enum": ["false"]}}},
    529: {"retry-after": _SECONDS},
}
_COMMON = {
    "x-request-id": {"$ref": "#/components/headers/x-request-id"},
    "openai-processing-ms": {"$ref": "#/components/headers/openai-processing-ms"},
}


def answers(
    name: str,
    *,
    stream: str | None = None,
    errors: Iterable[int] = (),
    media_type: str | tuple[str, ...] = "application/json",
    also: Iterable[int] = (),
    done: bool = True,
    error: str = "Error",
) -> dict[str, Any]:
    """Options for a router's decorator. `name`: of the shape of the answer with status 200, and with those in `also`;
    `stream`: of the shape of each event, where there may be a stream of them; `errors`: the statuses of errors that can
    come, but for 401, which every guarded route has where there are keys; `done`: whether a stream ends with `[DONE]`;
    `error`: the shape of errors."""
    assert name in SHAPES and (stream is None or stream in SHAPES)
    kinds = (media_type,) if isinstance(media_type, str) else media_type
    content: dict[str, Any] = {kind: {"schema": ref(name)} for kind in kinds}
    if stream is not None:
        data = {"type": "string", "contentMediaType": "application/json", "contentSchema": ref(stream)}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        content["text/event-stream"] = {"itemSchema": event}
    last = ", and `[DONE]` for the last" if done else ""
    description = f"The answer; with `stream`, as events{last}." if stream else "The answer."
    headers = dict(_COMMON)
    if error == "MessagesError":
        headers["request-id"] = {"$ref": "#/components/headers/request-id"}
        headers["x-dropped-system-line"] = {"$ref": "#/components/headers/x-dropped-system-line"}
    if 500 in errors:
        headers["x-max-tokens"] = {"$ref": "#/components/headers/x-max-tokens"}
    if 400 in errors and name != "Error":
        headers["x-unsupported-params"] = {"$ref": "#/components/headers/x-unsupported-params"}
    responses: dict[int, Any] = {200: {"description": description, "headers": headers, "content": content}}
    for status in also:
        responses[status] = {
            "description": MEANING[status],
            "headers": {**_COMMON, **_HEADERS.get(status, {})},
            "content": content,
        }
    responses |= {status: error_answer(status, error) for status in sorted(errors)}
    return {"response_class": Response, "responses": responses}


def error_answer(status: int, error: str = "Error") -> dict[str, Any]:
    return {
        "description": MEANING[status],
        "headers": {**_COMMON, **_HEADERS.get(status, {})},
        "content": {"application/json": {"schema": ref(error)}},
    }


COMMON_HEADERS = {
    "x-request-id": {
        "description": "Of this request, also in the log.",
        "required": True,
        "schema": {"type": "string"},
    },
    "openai-processing-ms": {
        "description": "From the first header to the first byte of the answer.",
        "required": True,
        "schema": {"type": "integer", "minimum": 0},
    },
    "request-id": {
        "description": "The same as x-request-id, under the name that clients of Anthropic's API read.",
        "required": True,
        "schema": {"type": "string"},
    },
    "x-dropped-system-line": {
        "description": "What was taken out of the head of the system prompt, where it would end every prefix cache.",
        "schema": {"type": "string"},
    },
    "x-max-tokens": {
        "description": "How long the answer may be, tokens, where the context leaves less than was allowed.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "x-unsupported-params": {
        "description": "Fields of the request that had no effect, because nobody here knows them.",
        "schema": {"type": "string"},
    },
}
