"""What a setting takes, and what is wrong with a value, in our words: the library's are for programmers."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails


def wrong_value(field: FieldInfo, error: ErrorDetails) -> str:
    """Behind the setting and a colon: what it takes, what it was given, and what it is where it is left out. A secret
    is not shown."""
    own = error["msg"].removeprefix("Value error, ") if error["type"] == "value_error" else ""
    value = error["input"]
    if own:
        return own if value == "" or not field.repr else f"{own} (got {_shown(value)})"
    got = f", not {_shown(value)}" if field.repr else ""
    return f"takes {taken(field)}{got}{_default(field)}"


def taken(field: FieldInfo) -> str:
    """The values of a setting: "a whole number from 0 to 65535"."""
    kind = _kind(field.annotation)
    if get_origin(kind) is Literal:
        *others, last = map(str, get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    if get_origin(kind) is list:
        return "values separated by commas"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    return names[kind] + _range(field.metadata)


def _kind(annotation: Any) -> Any:
    """The type without `| None`."""
    if get_origin(annotation) in (Literal, list):
        return annotation
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
    assert len(kinds) == 1, f"{annotation} has no words yet"
    return kinds[0]


def _range(metadata: list[Any]) -> str:
    lowest = next((_number(bound.ge) for bound in metadata if isinstance(bound, Ge)), None)
    above = next((_number(bound.gt) for bound in metadata if isinstance(bound, Gt)), None)
    most = next((_number(bound.le) for bound in metadata if isinstance(bound, Le)), None)
    below = next((_number(bound.lt) for bound in metadata if isinstance(bound, Lt)), None)
    if any(isinstance(bound, MinLen) for bound in metadata):
        return " that is not empty"
    if lowest is not None and most is not None:
        return f" from {lowest} to {most}"
    parts = [
        *([f"of at least {lowest}"] if lowest is not None else []),
        *([f"above {above}"] if above is not None else []),
        *([f"of at most {most}"] if most is not None else []),
        *([f"below {below}"] if below is not None else []),
    ]
    return " " + " and ".join(parts) if parts else ""


def _number(bound: Any) -> str:
    return f"{bound:,}" if isinstance(bound, int) and abs(bound) >= 10**5 else f"{bound:g}"


def _default(field: FieldInfo) -> str:
    value = field.default
    if field.is_required() or value is None or value == []:
        return ""
    return f"; left out, it is {str(value).lower() if isinstance(value, bool) else value}"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        text = str(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of more than 40 digits"
        return repr(text[:80]) if isinstance(value, str) else text
    names: dict[type, str] = {dict: "a table", list: "an array"}
    return names.get(type(value), f"a {type(value).__name__}")


def option_lines(spelled: str, field: FieldInfo, width: int) -> list[str]:
    """Of --help: the flag with what it takes, and below it what it is for."""
    kind = _kind(field.annotation)
    value = {bool: "", int: " N", float: " X", Path: " PATH"}.get(kind, " TEXT")
    if get_origin(kind) is Literal:
        value = f" {'|'.join(map(str, get_args(kind)))}"
    opposite = f", --no-{spelled[2:]}" if kind is bool else ""
    notes = [_range(field.metadata).strip()] if kind in (int, float) else []
    if not field.is_required() and field.default not in (None, []):
        shown = str(field.default).lower() if kind is bool else str(field.default)
        notes.append(f"default: {shown}")
    noted = f" ({'; '.join(filter(None, notes))})" if any(notes) else ""
    text = " ".join((field.description or "").split()) + noted
    return [
        f"  {spelled}{value}{opposite}",
        *textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]
