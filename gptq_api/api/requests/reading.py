"""Reading loosely typed JSON: bodies whose parts differ by their `type`, and of which unknown ones are skipped.

Each function raises ApiError 400 that names the place, such as `input[3].content[0].text`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gptq_api.api.errors import ApiError, bad_request
from gptq_api.api.requests.fields import MAX_TEXT, check_text

MAX_NAME = 512


def missing(path: str) -> ApiError:
    return bad_request(f"Missing required parameter: '{path}'.", path, "missing_required_parameter")


def invalid(path: str, reason: str) -> ApiError:
    return bad_request(f"Invalid value for '{path}': {reason}.", path)


def text_at(fields: Mapping[str, Any], name: str, path: str, *, longest: int = MAX_TEXT) -> str:
    """The string `fields[name]`, which has to be there. `path`: of `fields`."""
    if fields.get(name) is None:
        raise missing(f"{path}.{name}")
    return text(fields[name], f"{path}.{name}", longest=longest)


def optional_text_at(fields: Mapping[str, Any], name: str, path: str) -> str:
    """ "" where there is none."""
    return "" if fields.get(name) is None else text(fields[name], f"{path}.{name}")


def text(value: Any, path: str, *, longest: int = MAX_TEXT) -> str:
    if not isinstance(value, str):
        raise bad_request(f"Invalid value for '{path}': it must be a string.", path, "invalid_type")
    if len(value) > longest:
        raise invalid(path, f"it may have at most {longest} characters")
    try:
        return check_text(value)
    except ValueError as error:
        raise invalid(path, str(error)) from None


def parts_of(content: Any, path: str, kind: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The parts of a content as (their path, their type, they themselves); a string is one part of type `kind`."""
    if isinstance(content, str):
        yield path, kind, {"type": kind, "text": text(content, path)}
        return
    if not isinstance(content, list):
        raise bad_request(f"Invalid value for '{path}': it must be a string or an array.", path, "invalid_type")
    for index, part in enumerate(content):
        place = f"{path}[{index}]"
        if not isinstance(part, dict):
            raise bad_request(f"Invalid value for '{place}': it must be an object.", place, "invalid_type")
        yield place, text_at(part, "type", place, longest=MAX_NAME), part
