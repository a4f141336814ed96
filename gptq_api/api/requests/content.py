"""What a message says: a text, or parts that become one."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from gptq_api.api.requests.fields import MAX_TEXT, MAX_UNKNOWN, check_text, printable
from gptq_api.text.chat import joined_parts

MAX_PARTS = 1024


def _text(value: Any) -> str:
    """A string, or text parts, which become one."""
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise ValueError(f"it may have at most {MAX_TEXT} characters")
        return check_text(value)
    if not isinstance(value, list):
        raise ValueError("it must be a string or an array of text parts")
    if len(value) > MAX_PARTS:
        raise ValueError(f"it may hold at most {MAX_PARTS} parts")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError('only parts of type "text" are supported by this model')
        if not isinstance(part.get("text"), str):
            raise ValueError('a text part needs a string "text"')
        check_text(part["text"])
    return joined_parts(value)


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value)


def unknown_in_parts(parts: list[dict[str, Any]]) -> list[str]:
    """Paths of fields that nobody knows in the parts of a content, at most MAX_UNKNOWN."""
    known = {"type", "text"}
    names = ((index, name) for index, part in enumerate(parts) for name in part if name not in known)
    return [f"content[{index}].{printable(name)}" for index, name in islice(names, MAX_UNKNOWN)]


_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"type": "string", "enum": ["text"]}, "text": {"type": "string", "maxLength": MAX_TEXT}},
}
_SCHEMAS = [{"type": "string", "maxLength": MAX_TEXT}, {"type": "array", "items": _PART, "maxItems": MAX_PARTS}]
Content = Annotated[str, PlainValidator(_text), WithJsonSchema({"anyOf": _SCHEMAS})]
ContentOrNone = Annotated[
    str | None, PlainValidator(_text_or_none), WithJsonSchema({"anyOf": [*_SCHEMAS, {"type": "null"}]})
]
