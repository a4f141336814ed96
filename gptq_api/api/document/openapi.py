"""/openapi.json: what the framework finds out about requests, and what routes declare about answers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Sequence
from typing import Any

from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from gptq_api.api.document.declare import COMMON_HEADERS, error_answer
from gptq_api.api.document.shapes import SHAPES
from gptq_api.api.messages_errors import MESSAGES

VERSION = "3.2.0"
"""the first in which the shape of a stream's events can be said"""
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def openapi_document(
    routes: Sequence[APIRoute],
    public: Collection[str],
    *,
    title: str,
    version: str,
    keyed: bool,
    any_model: bool,
    with_roles: bool = False,
) -> dict[str, Any]:
    """`public`: paths that need no key; `keyed`: whether the others need one; `with_roles`: whether a key may be for
    some of them only; `any_model`: whether no name is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GET and HEAD of one route have one name until we give them two
        document: dict[str, Any] = _plain(
            get_openapi(title=title, version=version, openapi_version=VERSION, routes=routes)
        )
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    assert not schemas.keys() & SHAPES.keys(), "a request's body and an answer have one name"
    schemas.update(SHAPES)
    components["headers"] = COMMON_HEADERS
    if keyed:
        components["securitySchemes"] = _SCHEMES
    for path, operations in document["paths"].items():
        for operation in operations.values():
            error = "MessagesError" if path.startswith(MESSAGES) else "Error"
            guarded = (401, 403) if with_roles else (401,)
            no_name_is_wrong = any_model and not path.startswith(("/v1/files", "/v1/batches"))
            _finish(operation, guarded if keyed and path not in public else (), any_model=no_name_is_wrong, error=error)
        if "get" in operations:
            operations["head"] = _head_of(operations["get"])
    return document


def _plain(value: Any) -> Any:
    """The framework makes floats of all bounds; they become the integers that were meant."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return min(int(value), 2**63 - 1)
    return value


def _finish(operation: dict[str, Any], guarded: Sequence[int], *, any_model: bool, error: str) -> None:
    """`guarded`: the statuses that come of keys."""
    responses = operation["responses"]
    responses.pop("422", None)  # every wrong body is a 400 here
    if any_model:
        responses.pop("404", None)
    if guarded:
        responses |= {str(status): error_answer(status, error) for status in guarded}
        operation["security"] = [{name: []} for name in _SCHEMES]
    operation["responses"] = dict(sorted(responses.items()))


def _head_of(operation: dict[str, Any]) -> dict[str, Any]:
    head = copy.deepcopy(operation)
    head["operationId"] = operation["operationId"].removesuffix("_get") + "_head"
    for response in head["responses"].values():
        response.pop("content", None)
    return head
