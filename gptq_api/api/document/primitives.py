"""What shapes of answers are written with."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
TIME: Schema = {"type": "integer", "minimum": 0, "description": "Unix time, seconds"}
NULL: Schema = {"type": "null"}
BYTE: Schema = {"type": "integer", "minimum": 0, "maximum": 255}
LOGPROB: Schema = {"type": "number", "maximum": 0}


def ref(name: str) -> Schema:
    """Another shape."""
    return {"$ref": f"#/components/schemas/{name}"}


def either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def array(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


def const(*values: str | None) -> Schema:
    return {"const": values[0]} if len(values) == 1 else {"enum": list(values)}


def shape(_optional: dict[str, Schema] | None = None, /, **required: Schema) -> Schema:
    """An object with these fields and no others."""
    properties = {**required, **(_optional or {})}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
