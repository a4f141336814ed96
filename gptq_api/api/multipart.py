"""multipart/form-data (RFC 7578) as it arrives: what belongs to a file is handed on and not kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message

from gptq_api.errors import UserError

MAX_PARTS = 32
MAX_HEADER_BYTES = 4096
"""of one part"""


class MultipartError(UserError):
    """The body is none; half a sentence that says why."""


@dataclass(slots=True, frozen=True)
class Part:
    """A field of the form begins."""

    name: str
    filename: str | None
    """of a file"""


def boundary_of(content_type: str) -> bytes:
    """Raises MultipartError."""
    message = Message()
    message["content-type"] = content_type
    boundary = message.get_boundary() if message.get_content_type() == "multipart/form-data" else None
    if not boundary or len(boundary) > 70 or not boundary.isascii():
        raise MultipartError("the content type has to be multipart/form-data with a boundary")
    return boundary.encode()


class MultipartReader:
    def __init__(self, boundary: bytes) -> None:
        self._mark = b"\r\n--" + boundary
        self._buffer = bytearray(b"\r\n")  # so that the first boundary looks like the others
        self._where = "before"
        self._num_parts = 0

    def feed(self, data: bytes) -> Iterator[Part | bytes]:
        """Parts, each followed by pieces of its content. Raises MultipartError."""
        self._buffer += data
        while (step := getattr(self, f"_{self._where}")()) is not None:
            yield from step

    def finish(self) -> None:
        """Nothing more comes. Raises MultipartError where something is missing."""
        if self._where != "behind":
            raise MultipartError("it ends before its last boundary")

    def _before(self) -> list[Part | bytes] | None:
        """What stands before the first boundary is nobody's."""
        found = self._content()
        return None if found is None else []

    def _content(self) -> list[Part | bytes] | None:
        at = self._buffer.find(self._mark)
        end = at if at >= 0 else max(0, len(self._buffer) - len(self._mark) + 1)
        if at < 0 and not end:
            return None
        piece = bytes(self._buffer[:end])
        del self._buffer[: end + (len(self._mark) if at >= 0 else 0)]
        if at >= 0:
            self._where = "boundary"
        return [piece] if piece else []

    def _boundary(self) -> list[Part | bytes] | None:
        if len(self._buffer) < 2:
            return None
        if self._buffer.startswith(b"--"):
            self._where = "behind"
        elif self._buffer.startswith(b"\r\n"):
            del self._buffer[:2]
            self._where = "header"
        else:
            raise MultipartError("a boundary is followed by something else than the end of its line")
        return []

    def _header(self) -> list[Part | bytes] | None:
        at = self._buffer.find(b"\r\n\r\n")
        if at > MAX_HEADER_BYTES or (at < 0 and len(self._buffer) > MAX_HEADER_BYTES):
            raise MultipartError(f"the headers of a part are longer than {MAX_HEADER_BYTES} bytes")
        if at < 0:
            return None
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise MultipartError(f"it has more than {MAX_PARTS} parts")
        part = _part(self._buffer[:at].decode(errors="replace"))
        del self._buffer[: at + 4]
        self._where = "content"
        return [part]

    def _behind(self) -> None:
        self._buffer.clear()


def _part(header: str) -> Part:
    message = Message()
    for line in header.split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-disposition":
            message["content-disposition"] = value.strip().replace("\n", " ").replace("\r", " ")
            break
    field = message.get_param("name", header="content-disposition")
    if message.get_content_disposition() != "form-data" or not isinstance(field, str):
        raise MultipartError("a part has no Content-Disposition: form-data with a name")
    return Part(field, message.get_filename())
