"""What is wrong with a body that the validator refused: the field, the reason and the value, in our words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_REASONS = {
    "bool_type": "it must be true or false",
    "string_type": "it must be a string",
    "string_unicode": "it holds half of a surrogate pair, which is not text",
    "string_too_long": "it may have at most {max_length} characters",
    "string_too_short": "it must have at least {min_length} characters",
    "string_pattern_mismatch": "it must match {pattern}",
    "int_type": "it must be an integer",
    "int_from_float": "it must be an integer",
    "int_parsing_size": "it must be an integer of at most 64 bits",
    "float_type": "it must be a number",
    "finite_number": "it must be a finite number",
    "greater_than_equal": "it must be at least {ge}",
    "greater_than": "it must be more than {gt}",
    "less_than_equal": "it must be at most {le}",
    "less_than": "it must be less than {lt}",
    "list_type": "it must be an array",
    "tuple_type": "it must be an array",
    "too_long": "it may hold at most {max_length} entries",
    "too_short": "it must hold at least {min_length} entries",
    "dict_type": "it must be an object",
    "dict_attributes_type": "it must be an object",
    "model_type": "it must be an object",
    "model_attributes_type": "it must be an object",
    "dataclass_type": "it must be an object",
    "literal_error": "it must be {expected}",
    "enum": "it must be {expected}",
    "none_required": "it must be null",
    "extra_forbidden": "it is not known here",
    "recursion_loop": "it is nested too deeply",
    "value_error": "{error}",
    "assertion_error": "{error}",
}
"""by the validator's type of error; the braces hold what it says besides"""
_WORD = re.compile(r"[A-Za-z0-9_.:-]{1,40}")
"""where a word of ours is expected: somebody's choice, and no text"""
_MAX_LOOKED_AT = 64
_WRONG_TYPES = {kind for kind in _REASONS if kind.endswith("_type")} | {"int_from_float"}


class Invalid(NamedTuple):
    """The first thing that is wrong."""

    param: str | None
    """`messages[0].role`; None for the body itself"""
    reason: str
    """behind "Invalid value for 'param': " """
    code: str


def first_invalid(errors: Sequence[Mapping[str, Any]], body: Any) -> Invalid:
    """`errors`: the validator's, at least one, in its order; `body`: what it was given."""
    path = _path(errors[0], body)
    # of a union the validator tells every branch: the one that got furthest is the one that was meant
    rest = [(error, _path(error, body)) for error in errors[:_MAX_LOOKED_AT]]
    first, path = max((pair for pair in rest if pair[1][: len(path)] == path), key=lambda pair: len(pair[1]))
    kind = first["type"]
    if kind == "missing":
        return Invalid(_spelled(path), "it is required", "missing_required_parameter")
    key = first["loc"][-1] == "[key]"
    what = _REASONS.get(kind, "it is not valid").format_map(_plain(first.get("ctx") or {}))
    reason = f"its key must be {_key_rule(kind, first)}" if key else what
    code = "invalid_type" if kind in _WRONG_TYPES else "invalid_value"
    value = first.get("input")
    # a rule about a whole object names what is wrong in it
    got = "" if key or (kind == "value_error" and isinstance(value, dict)) else shown(value)
    if kind == "literal_error" and isinstance(value, str) and _WORD.fullmatch(value):
        got = f", got '{value}'"
    if kind in ("too_short", "string_too_short") and not value:
        reason, got = "it must not be empty", ""
    return Invalid(_spelled(path), reason[:300] + got, code)


def _plain(context: Mapping[str, Any]) -> dict[str, Any]:
    """Bounds as people write them: 2, not 2.0."""
    whole = {name: int(value) for name, value in context.items() if isinstance(value, float) and value.is_integer()}
    return {**context, **whole}


def _key_rule(kind: str, error: Mapping[str, Any]) -> str:
    if kind == "string_pattern_mismatch" and error["ctx"]["pattern"] == "^[0-9]+$":
        return "a token id, in digits"
    if kind == "string_too_long":
        return f"at most {error['ctx']['max_length']} characters"
    return "text"


def _path(error: Mapping[str, Any], body: Any) -> tuple[int | str, ...]:
    """Where in the body: the parts of the validator's place that lead somewhere. The others are its names for what it
    tried."""
    path: list[int | str] = []
    value = body
    *parts, last = error["loc"][1:] or (None,)
    for part in parts:
        if _is_in(part, value):
            path.append(part)
            value = value[part]
    if last is not None and (_is_in(last, value) or error["type"] == "missing" or body is None):
        path.append(last)
    return tuple(path)


def _is_in(part: object, value: object) -> bool:
    """Whether it is a key or an index of the value."""
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def _spelled(path: tuple[int | str, ...]) -> str | None:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part[:64]}" if text else part[:64]
    return text or None


def shown(value: object) -> str:
    """What was sent, where that is short and plain; never a text of the user's."""
    if isinstance(value, bool):
        return f", got {str(value).lower()}"
    if isinstance(value, float) or (isinstance(value, int) and abs(value) < 10**30):
        return f", got {value}"
    if value is None:
        return ", got null"
    if isinstance(value, int):
        return ", got a number of more than 30 digits"
    names: dict[type, str] = {str: "a string", list: "an array", dict: "an object"}
    return f", got {names[type(value)]}" if type(value) in names else ""
