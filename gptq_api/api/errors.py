"""Every error a client sees: `{"error": {"message", "type", "param", "code"}}`, bounded, never echoing input at length.

Status codes and the context sentence follow what the OpenAI SDK, LangChain and LiteLLM act upon; 422 is never used
because clients hide the reason behind it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from gptq_api.api.invalid import first_invalid
from gptq_api.api.messages_errors import MESSAGES, messages_error, messages_status
from gptq_api.api.unknown_url import unknown_url
from gptq_api.edge.limits import LimitReached
from gptq_api.engine.places import PlacesTaken

MAX_MESSAGE = 1000

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(HTTPException):
    """Ends a request with an OpenAI error object. `extra` joins it (n_prompt_tokens ...)."""

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(status_code, message, headers)
        self.error: dict[str, Any] = error_object(status_code, message, param, code)
        self.error.update(extra or {})


def error_object(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"message": _text(message), "type": kind, "param": None if param is None else _text(param), "code": code}


def _text(text: str) -> str:
    """Bounded, and encodable: a client's key may hold half of a surrogate pair."""
    return text[:MAX_MESSAGE].encode(errors="replace").decode()


_TELLING = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/responses"}
"""the fields by which one sees which route a body is for"""


def error_body(status: int, message: str) -> bytes:
    """For errors that the edge finds, such as a header that never ends."""
    return _body(error_object(status, message))


def _body(error: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode({"error": error})


def bad_request(message: str, param: str | None, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def not_supported(param: str, what: str = "is not supported by this server") -> ApiError:
    """A field we know and do not honour: refused by name, never ignored."""
    return ApiError(400, f"'{param}' {what}; leave it out.", param=param, code="unsupported_parameter")


def wrong_key(why: str) -> ApiError:
    """`why`: what was sent instead of a key that is known, a sentence without its period."""
    message = f"{why}: send one of this server's keys as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def wrong_role(role: str, needed: str) -> ApiError:
    message = f"The role of this key is '{role}', and this needs '{needed}' or 'admin'."
    return ApiError(403, message, code="insufficient_permissions")


def too_many(retry_after_s: float, message: str, code: str) -> ApiError:
    headers = {"retry-after": str(math.ceil(retry_after_s)), "retry-after-ms": str(math.ceil(retry_after_s * 1000))}
    return ApiError(429, message, code=code, headers=headers)


def rate_limited(reached: LimitReached) -> ApiError:
    error = too_many(reached.retry_after_s, str(reached), "rate_limit_exceeded")
    error.error["type"] = "tokens" if reached.kind == "tokens" else "requests"  # OpenAI's words for it
    return error


def server_full(taken: PlacesTaken) -> ApiError:
    if taken.share:
        return too_many(taken.retry_after_s, f"Your share of the server is full: {taken}.", "share_full")
    return too_many(taken.retry_after_s, f"The server is full: {taken}.", "server_full")


def bodies_full() -> ApiError:
    message = "The server holds as many bytes of unfinished request bodies as it may; try again in 1 s."
    return too_many(1.0, message, "server_full")


def shutting_down() -> ApiError:
    return unavailable("The server is shutting down.", "server_shutting_down")


def body_stalled() -> ApiError:
    return ApiError(408, "The body of the request stopped arriving, and others needed its room.", code="body_stalled")


def unavailable(message: str, code: str, retry_after_s: int = 5) -> ApiError:
    return ApiError(503, message, code=code, headers={"retry-after": str(retry_after_s)})


def deadline_exceeded() -> ApiError:
    """Not to be tried again by the client's library: whoever waits has set how long."""
    return ApiError(
        504,
        "The timeout of the request was over before the first token of its answer.",
        param="timeout",
        code="deadline_exceeded",
        headers={"x-should-retry": "false"},
    )


def context_exceeded(
    max_model_len: int, num_prompt: int, num_answer: int, *, what: str, param: str, at_least: bool = False
) -> ApiError:
    """OpenAI's own sentence: LangChain and LiteLLM recognise the overflow by it. `what`: the field that the prompt came
    in, `param`: the one to blame."""
    message = (
        f"This model's maximum context length is {max_model_len} tokens. However, you requested "
        f"{'at least ' if at_least else ''}{num_prompt + num_answer} tokens ({num_prompt} in the {what}, "
        f"{num_answer} in the completion). Please reduce the length of the {what} or completion."
    )
    extra = {"n_prompt_tokens": num_prompt, "n_ctx": max_model_len}
    return ApiError(400, message, param=param, code="context_length_exceeded", extra=extra)


def _meant(missing: str | None, body: Any) -> str:
    """A sentence where the body is one for another route."""
    for field, path in _TELLING.items():
        if missing in _TELLING and isinstance(body, dict) and field in body and field != missing:
            return f" A body with '{field}' is for {path}."
    return ""


def invalid_body(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """What the validator found wrong with a body: the first of it, with its name and the remedy."""
    param, reason, code = first_invalid(errors, body)
    if code == "missing_required_parameter":
        return ApiError(400, f"Missing required parameter: '{param}'.{_meant(param, body)}", param=param, code=code)
    name = f"'{param}'" if param else "the request body"
    return ApiError(400, f"Invalid value for {name}: {reason}.", param=param, code=code)


def error_response(
    request: Request, status: int, error: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> Response:
    """In the shape of the API that the route belongs to."""
    record = request.scope["state"]["record"]
    record.error = error["code"] or error["type"]
    if request.scope["path"].startswith(MESSAGES):
        body = messages_error(status, error, record.request_id)
        headers = {**(headers or {}), "request-id": record.request_id}
        return Response(msgspec.json.encode(body), messages_status(status, error["code"]), headers, "application/json")
    return Response(_body(error), status, headers, "application/json")


async def on_http_exception(request: Request, error: Exception) -> Response:
    """ApiError, and the router's own 404 and 405 (which keeps its Allow header)."""
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error_response(request, error.status_code, error.error, error.headers)
    path, headers = request.scope["path"][:200], error.headers
    if path == "*":  # OPTIONS * asks for the server as a whole
        return Response(status_code=204, headers={"allow": "GET, HEAD, POST, DELETE, OPTIONS"})
    if error.status_code == 404:
        message, code = unknown_url(request.method, path, request.app.state.paths)
        body = error_object(404, message, code=code)
    elif error.status_code == 405:
        # the router knows those of the first route alone
        allowed = ", ".join(
            sorted({m for r in request.app.state.routes if r.path_regex.match(path) for m in r.methods})
        )
        headers = {"allow": allowed}
        body = error_object(
            405, f"{request.method} is not allowed for {path}; use {allowed}.", code="method_not_allowed"
        )
    else:
        body = error_object(error.status_code, HTTPStatus(error.status_code).phrase)
    return error_response(request, error.status_code, body, headers)


async def on_validation_error(request: Request, error: Exception) -> Response:
    """The first thing that is wrong with the body."""
    assert isinstance(error, RequestValidationError)
    return error_response(request, 400, invalid_body(error.errors(), error.body).error)


async def on_exception(request: Request, error: Exception) -> Response:
    """A bug of ours. The details are in the log only."""
    message = "The server had an error while processing the request."
    return error_response(request, 500, error_object(500, message))
