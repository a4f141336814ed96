"""The body of a request, from the socket to a JSON object; every way of getting it wrong has an answer.

Nothing of this may hold up the event loop. What JSON costs to read and to validate is its values and not its bytes: a
megabyte of text takes a millisecond, one of `[[],[],...` fifty. So the values of a large body are counted while it
arrives, it is refused as soon as there are too many, and what is left to do is done in a thread, which the interpreter
interrupts every 5 ms but in the parser itself.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from gptq_api.api.errors import ApiError, bodies_full, invalid_body
from gptq_api.api.service import Service, get_record
from gptq_api.edge.in_flight import SMALL, Arriving, NoRoomError

MAX_VALUES = 2**18
"""elements of arrays and objects in one body: as many as the longest prompt of token ids has"""
MAX_NODES = 2**16
"""keys, arrays and objects in one body: 4,096 messages with their parts and calls, or tools of 100 schemas"""
_NO_STRUCTURE = bytes(set(range(256)) - set(b'",:[{'))


T = TypeVar("T")


class JsonRequest(Request):
    is_large = False

    async def load(self, service: Service, model: type[BaseModel]) -> None:
        """Read and parse the body; a large one is validated, too. Raises ApiError 400, 413, 415, 429, 503."""
        most = service.max_body_bytes
        length = self._declared_length()
        self._check_headers(length, most)
        if service.draining or length is None or length > SMALL:
            service.check_room(get_record(self))  # what would be refused then is not read first
            if not service.bodies.room_for(length or 0):
                raise bodies_full()
        owner = get_record(self).caller.owner if service.engine.places.shared else None
        with Arriving(service.bodies, owner) as body:
            pieces = await self._read(body, most)
            body.finish()
            self.is_large = body.size > SMALL
            if self.is_large:
                self._json = await beside(self, service, lambda: _validated(parsed(b"".join(pieces)), model))
            else:
                self._json = parsed(b"".join(pieces))
        self._body = b"{}"  # FastAPI asks whether there is one

    async def _read(self, body: Arriving, most: int) -> list[bytes]:
        """In pieces, since what grows by being copied leaves holes in the memory."""
        pieces, rest, counted = list[bytes](), bytearray(), Counted()
        async for chunk in self.stream():
            if body.size + len(chunk) > most:
                raise _too_large(most)
            try:
                body.grow(len(chunk))
            except NoRoomError:
                raise bodies_full() from None
            rest += chunk
            if len(rest) >= SMALL:
                pieces.append(bytes(rest))
                rest.clear()
                counted.add(pieces[-1])
                counted.check()
                _counted.set(counted)
        pieces.append(bytes(rest))
        if len(pieces) > 1:
            counted.add(pieces[-1])
            counted.check()
        return pieces

    def _declared_length(self) -> int | None:
        """None where it comes in chunks."""
        length = self.headers.get("content-length", "")
        if "transfer-encoding" in self.headers:
            return None
        return int(length[:20]) if length.isdecimal() else 0

    def _check_headers(self, length: int | None, most: int) -> None:
        if length is not None and length > most:
            raise _too_large(most)
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


class Counted:
    """How many values a JSON text has, of which pieces are added: exact, without what stands in strings, and 0.4 ms for
    64 KiB at worst."""

    def __init__(self) -> None:
        self.num_values = 0
        self.num_nodes = 0
        self._in_string = 0
        self._rest = b""

    def add(self, piece: bytes) -> None:
        piece = self._rest + piece
        whole = piece.rstrip(b"\\")  # whether these escape something is seen with the next piece
        self._rest = piece[len(whole) :]
        marks = whole.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_STRUCTURE)
        parts = marks.split(b'"')
        outside = b"".join(parts[self._in_string :: 2])
        self._in_string = (self._in_string + len(parts) - 1) % 2
        self.num_values += outside.count(b",")
        self.num_nodes += outside.count(b":") + outside.count(b"[") + outside.count(b"{")

    def check(self) -> None:
        """Raises ApiError 400."""
        if self.num_nodes > MAX_NODES:
            raise _too_many(f"{MAX_NODES} keys, arrays and objects")
        if self.num_values > MAX_VALUES:
            raise _too_many(f"{MAX_VALUES} values")


_counted: ContextVar[Counted] = ContextVar("counted")
"""of a large body, while it is handled"""


def count_text(text: str) -> None:
    """For JSON in a string of a body, which costs as much as the rest. Raises ApiError 400."""
    counted = _counted.get(None)
    if counted is not None:
        inner = Counted()
        inner.add(text.encode())
        counted.num_values += inner.num_values
        counted.num_nodes += inner.num_nodes
        counted.check()


async def beside(request: Request, service: Service, work: Callable[[], T]) -> T:
    """What `work` returns. With a large body it may take long, so others have their turns meanwhile."""
    if not (isinstance(request, JsonRequest) and request.is_large):
        return work()
    async with service.bodies.turn:
        return await asyncio.to_thread(work)


def _validated(body: Any, model: type[BaseModel]) -> BaseModel:
    """As FastAPI does it, which takes what is valid as it is. Raises ApiError 400."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise invalid_body([{**found, "loc": ("body", *found["loc"])} for found in errors], body) from None


def _too_many(what: str) -> ApiError:
    return ApiError(400, f"The body holds more than {what}: send less at a time.", code="request_too_large")


def _too_large(max_bytes: int) -> ApiError:
    message = f"The request body is larger than {max_bytes} bytes, the limit of this server (--max-body-bytes)."
    return ApiError(413, message, code="request_too_large")


def parsed(body: bytes) -> Any:
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
