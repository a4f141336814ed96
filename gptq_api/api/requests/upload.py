"""POST /v1/files: a form with a file, which goes to the disk as it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import BinaryIO, TypeVar

from fastapi import Request

from gptq_api.api.errors import ApiError, bad_request
from gptq_api.api.multipart import MultipartError, MultipartReader, Part, boundary_of
from gptq_api.api.requests.batches import LONGEST_KEPT_S, SHORTEST_KEPT_S
from gptq_api.errors import UserError

T = TypeVar("T")
PURPOSE = "batch"
MAX_FIELD = 256
"""bytes of one field that is no file"""
WRITE_BYTES = 256 * 1024
FORM_BYTES = 64 * 1024
"""that a form may have besides its file"""
SLOWEST_BYTES_PER_S = 2**18
"""at which a file may arrive"""
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


@dataclass(slots=True)
class Form:
    filename: str | None = None
    """None where no file came"""
    size: int = 0
    fields: dict[str, bytes] = field(default_factory=dict)

    def check(self) -> int:
        """For how many seconds the file is kept. Raises ApiError 400."""
        values = {name: value.decode(errors="replace") for name, value in self.fields.items()}
        if self.filename is None:
            raise bad_request("Missing required parameter: 'file'.", "file", "missing_required_parameter")
        if "purpose" not in values:
            raise bad_request("Missing required parameter: 'purpose'.", "purpose", "missing_required_parameter")
        if values["purpose"] != PURPOSE:
            raise bad_request("Invalid value for 'purpose': this server keeps files for 'batch' only.", "purpose")
        if not self.size:
            raise bad_request("Invalid value for 'file': it is empty.", "file")
        if values.get("expires_after[anchor]", "created_at") != "created_at":
            raise bad_request(
                "Invalid value for 'expires_after[anchor]': it must be 'created_at'.", "expires_after[anchor]"
            )
        seconds = values.get("expires_after[seconds]", str(LONGEST_KEPT_S))
        if not seconds.isdecimal() or not SHORTEST_KEPT_S <= int(seconds[:12]) <= LONGEST_KEPT_S:
            raise bad_request(
                "Invalid value for 'expires_after[seconds]': it must be an integer from "
                f"{SHORTEST_KEPT_S} to {LONGEST_KEPT_S}.",
                "expires_after[seconds]",
            )
        return int(seconds)


class Room:
    """What uploads may write."""

    def __init__(self, most: int, free: int) -> None:
        """`most`: bytes of one file; `free`: of all that are on their way."""
        self.most, self.free = most, free

    def check(self, size: int) -> None:
        """Raises ApiError 413."""
        if size > self.most:
            raise ApiError(
                413,
                f"The file is larger than {self.most} bytes, the limit of this server (--batch-file-mib).",
                param="file",
                code="file_too_large",
            )
        if size > self.free:
            raise ApiError(
                413,
                "There is no room for the file: delete others, or raise --batch-disk-mib of this server.",
                param="file",
                code="storage_full",
            )


async def read_form(request: Request, file: BinaryIO, room: Room) -> Form:
    """The form of a request, its file written. Raises ApiError 400, 413, 415; UserError where it cannot be written."""
    coding = request.headers.get("content-encoding", "identity").lower()
    if coding != "identity":
        message = f"Content-Encoding {coding[:30]} is not supported; send the form as it is."
        raise ApiError(415, message, code="unsupported_content_encoding")
    length = request.headers.get("content-length", "")
    declared = int(length[:20]) if length.isdecimal() else 0
    room.check(max(0, declared - FORM_BYTES))
    request.scope["state"]["connection"].allow_body(declared / SLOWEST_BYTES_PER_S)
    form = Form()
    try:
        reader = MultipartReader(boundary_of(request.headers.get("content-type", "")))
        filling, waiting, surplus = "", bytearray(), 0
        async for chunk in request.stream():
            for item in reader.feed(chunk):
                if isinstance(item, Part):
                    filling = _begin(form, item)
                elif filling == "file":
                    form.size += len(item)
                    room.check(form.size)
                    waiting += item
                elif filling:
                    form.fields[filling] += item
                    if len(form.fields[filling]) > MAX_FIELD:
                        raise bad_request(f"'{filling}' is longer than {MAX_FIELD} bytes.", filling)
                else:
                    surplus += len(item)
                    if surplus > FORM_BYTES:
                        raise MultipartError(f"its parts have more than {FORM_BYTES} bytes beside those of the file")
            if len(waiting) >= WRITE_BYTES:
                await asyncio.to_thread(file.write, bytes(waiting))
                waiting.clear()
        reader.finish()
        await asyncio.to_thread(file.write, bytes(waiting))
    except MultipartError as error:
        raise ApiError(400, f"The body is no form with a file: {error}.", code="invalid_form") from None
    return form


def _begin(form: Form, part: Part) -> str:
    """Which field of the form comes now; "" for one before the first. Raises ApiError 400."""
    if part.name == "file":
        if form.filename is not None:
            raise bad_request("There are two files; send one.", "file")
        shown = PurePath((part.filename or "").replace("\\", "/")).name
        form.filename = "".join(letter for letter in shown if letter.isprintable())[:255] or "file.jsonl"
        return "file"
    if part.name not in _FIELDS:
        raise bad_request(f"Unknown parameter: '{part.name[:100]}'.", part.name[:100], "unknown_parameter")
    if part.name in form.fields:
        raise bad_request(f"'{part.name}' is there twice.", part.name)
    form.fields[part.name] = b""
    return part.name


@asynccontextmanager
async def in_thread(context: AbstractContextManager[T]) -> AsyncIterator[T]:
    """A context whose ends may take a disk's time. Raises ApiError 413 where the disk refuses."""
    try:
        value = await asyncio.to_thread(context.__enter__)
        try:
            yield value
        except BaseException as error:
            await asyncio.to_thread(context.__exit__, type(error), error, error.__traceback__)
            raise
        await asyncio.to_thread(context.__exit__, None, None, None)
    except (UserError, OSError) as error:
        raise ApiError(413, f"The file cannot be kept: {error}.", param="file", code="storage_full") from None
