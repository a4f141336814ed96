"""What crosses the socket to the process that encodes and renders, in frames: the number of a request (8 bytes,
little-endian), then the request as JSON, or the answer to the one of that number as msgpack.

JSON, since a client's schema of a tool may hold integers of any size.
"""

from __future__ import annotations

import struct
from typing import Any, Literal

import msgspec

from gptq_api.frames import WireError, frame
from gptq_api.text.chat import TemplateFacts
from gptq_api.text.tokens import TokenTable


class Load(msgspec.Struct, frozen=True):
    """The first frame: which checkpoint."""

    folder: str
    template: str | None
    """a file or the name of a built-in one, instead of the checkpoint's"""
    model_name: str
    with_template: bool = True


class Loaded(msgspec.Struct, frozen=True, tag=True):
    table: TokenTable
    facts: TemplateFacts | None


class Encode(msgspec.Struct, frozen=True, tag=True):
    """As `Tokenizer.encode`, for each of the texts."""

    texts: list[str]
    add_bos: bool = False
    parse_special: bool = False


class Render(msgspec.Struct, frozen=True, tag=True):
    """As `ChatTemplate.render`, or with `as_text` as its render_text."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    continue_final_message: bool
    variables: dict[str, Any]
    as_text: bool = False


Stage = Literal["load", "render", "encode"]


class Ids(msgspec.Struct, frozen=True, tag=True):
    """int32, little-endian, one for each text."""

    ids: list[bytes]


class Text(msgspec.Struct, frozen=True, tag=True):
    text: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The tokenizer or the template says no, in words for whoever sent the request or started the server."""

    message: str
    stage: Stage


class Died(msgspec.Struct, frozen=True, tag=True):
    """Who worked on the request is gone, by this signal (or exit status, negative)."""

    signal: int


Request = Encode | Render
Answer = Loaded | Ids | Text | Refused | Died

NUMBER = struct.Struct("<Q")
LOADING = 0
"""the number of the first frame; requests count from 1"""

encode_load = msgspec.json.Encoder().encode
decode_load = msgspec.json.Decoder(Load).decode
encode_request = msgspec.json.Encoder().encode
_decode_request = msgspec.json.Decoder(Request).decode
_encode_answer = msgspec.msgpack.Encoder().encode
_decode_answer = msgspec.msgpack.Decoder(Answer).decode


def split_request(payload: bytes) -> tuple[int, bytes]:
    """A frame's number and the rest of it."""
    return NUMBER.unpack_from(payload)[0], payload[NUMBER.size :]


def decode_request(data: bytes) -> Request:
    request: Request = _decode_request(data)
    return request


def answer_frame(number: int, answer: Answer) -> bytes:
    return frame(NUMBER.pack(number) + _encode_answer(answer))


def decode_answer(payload: bytes) -> tuple[int, Answer]:
    """Raises WireError, as where a worker was ended in the middle of an answer."""
    try:
        return NUMBER.unpack_from(payload)[0], _decode_answer(memoryview(payload)[NUMBER.size :])
    except (struct.error, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WireError(f"no answer of ours: {error}") from None
