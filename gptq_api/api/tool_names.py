"""Tools of the Responses and Messages APIs as functions that a chat template knows, and their names on the way back.

A model sees plain functions with names of at most 64 characters. A tool of a namespace is one of them under both names;
a `custom` tool, whose input is any text, is one with a single string; longer names are cut and made unique by a digest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

MAX_TOOL_NAME = 64
CUSTOM_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}


@dataclass(slots=True, frozen=True)
class Origin:
    """A tool as the client knows it."""

    name: str
    namespace: str | None = None
    custom: bool = False


@dataclass(slots=True)
class Toolbox:
    functions: list[dict[str, Any]] = field(default_factory=list)
    """the `tools` of a chat completion request"""
    origins: dict[str, Origin] = field(default_factory=dict)
    """by the name that the model sees"""

    def add(
        self, origin: Origin, description: str, parameters: dict[str, Any] | None, strict: bool | None = None
    ) -> None:
        name = model_name(origin.name, origin.namespace)
        schema = {key: value for key, value in (parameters or {}).items() if key != "$schema"}
        function: dict[str, Any] = {"name": name, "parameters": schema or {"type": "object", "properties": {}}}
        if description:
            function["description"] = description
        if strict is not None:
            function["strict"] = strict
        self.functions.append({"type": "function", "function": function})
        self.origins[name] = origin

    def origin(self, name: str) -> Origin:
        return self.origins.get(name) or Origin(name)


def model_name(name: str, namespace: str | None = None) -> str:
    """The same in every turn, so that a conversation stays a prefix of the next."""
    full = name if not namespace else f"{namespace}{'' if namespace.endswith('__') else '__'}{name}"
    if len(full) <= MAX_TOOL_NAME:
        return full
    return f"{full[: MAX_TOOL_NAME - 9]}_{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call of the past, as chat messages hold it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments or "{}"}}


def custom_arguments(text: str) -> str:
    return json.dumps({"input": text}, ensure_ascii=False)


def custom_input(arguments: str) -> str:
    """The text that a custom tool was called with; what was cut off half way comes as it is."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return value["input"] if isinstance(value, dict) and isinstance(value.get("input"), str) else arguments
