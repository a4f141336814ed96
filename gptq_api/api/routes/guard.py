"""The two kinds of routes there are: guarded ones, which is what a router makes, and the few public ones.

A guarded route checks the key and its role before it reads a byte of the body, then reads the body within the limit
and parses it. Authentication is what a route is, not what its path looks like.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from gptq_api.api.errors import ApiError, wrong_key, wrong_role
from gptq_api.api.service import get_record, get_service
from gptq_api.edge.auth import why_refused
from gptq_api.edge.keys import Role


class _Route(APIRoute):
    """What can be asked with GET can be asked with HEAD: the same answer, of which the connection sends no body."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.methods and "GET" in self.methods:
            self.methods.add("HEAD")


class PublicRoute(_Route):
    """For probes and the page that shows the API: tells nothing that not everyone may know."""


class GuardedRoute(_Route):
    """For everything else."""

    role: Role = "user"
    """which keys may use it, besides those that may all"""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            service = get_service(request)
            caller = service.auth.check(request.headers, request.client.host if request.client else "")
            if caller is None:
                raise wrong_key(why_refused(request.headers))
            record = get_record(request)
            record.caller = caller
            if caller.account is not None:
                record.notes["key"] = caller.account.name
            if not caller.may(self.role):
                raise wrong_role(caller.role, self.role)
            if request.method == "POST":
                request = _JsonRequest(request.scope, request.receive)
                await request.load(service.settings.max_body_bytes)
            return await handle(request)

        return guarded


class MetricsRoute(GuardedRoute):
    """For what watches the server: it tells of everybody's use."""

    role = "metrics"


def guarded_router() -> APIRouter:
    return APIRouter(route_class=GuardedRoute)


def metrics_router() -> APIRouter:
    return APIRouter(route_class=MetricsRoute)


def public_router() -> APIRouter:
    return APIRouter(route_class=PublicRoute)


class _JsonRequest(Request):
    """A request whose JSON is parsed here, where every way of getting it wrong has an answer."""

    async def load(self, max_bytes: int) -> None:
        """Read and parse the body. Raises ApiError 400, 413, 415."""
        self._check_headers(max_bytes)
        chunks = bytearray()
        async for chunk in self.stream():
            chunks += chunk
            if len(chunks) > max_bytes:
                raise _too_large(max_bytes)
        self._body = bytes(chunks)
        self._json = _parsed(self._body)

    def _check_headers(self, max_bytes: int) -> None:
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > max_bytes:
            raise _too_large(max_bytes)
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            # form types are refused for a second reason: a browser may send those across sites without asking
            sent = f"'{kind[:60]}'" if kind else "none"
            raise ApiError(
                400,
                f"The body must be JSON with 'Content-Type: application/json', but the content type is {sent}. "
                "With curl, add: -H 'Content-Type: application/json'",
                code="invalid_content_type",
            )
        coding = self.headers.get("content-encoding", "identity").lower()
        if coding != "identity":
            message = f"Content-Encoding {coding[:30]} is not supported; send plain JSON."
            raise ApiError(415, message, code="unsupported_content_encoding")


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {max_bytes} bytes.", code="request_too_large")


def _parsed(body: bytes) -> Any:
    if not body:
        raise _not_json("it is empty")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_json(f"byte {error.start} is not UTF-8") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise _not_json(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise _not_json("it is nested too deeply") from None
    except ValueError:  # a number of thousands of digits
        raise _not_json("a number in it is too long") from None
    if not isinstance(value, dict):
        raise _not_json("it must be an object")
    return value


def _not_json(why: str) -> ApiError:
    return ApiError(400, f"We could not parse the JSON body of your request: {why}.", code="invalid_json")
