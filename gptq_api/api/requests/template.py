"""What a request may tell the chat template besides its messages: only what that template reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, WithJsonSchema

from gptq_api.api.errors import bad_request, not_supported
from gptq_api.api.requests.fields import MAX_TEXT, Body, check_text
from gptq_api.text.chat import TemplateFacts

MAX_NAMES = 64
"""variables, or fields of one document"""
MAX_NAME = 64
MAX_VALUES = 4096
"""scalars of all variables together"""
MAX_DEPTH = 8
MAX_DOCUMENTS = 256
_MAX_INT = 2**63 - 1

_STRING = {"type": "string", "maxLength": MAX_TEXT}
_SCALARS: list[dict[str, Any]] = [
    _STRING,
    {"type": "integer", "minimum": -_MAX_INT, "maximum": _MAX_INT},
    {"type": "number", "minimum": -1e300, "maximum": 1e300},
    {"type": "boolean"},
    {"type": "null"},
]
_ANY = {"anyOf": [*_SCALARS, {"type": "array", "maxItems": MAX_VALUES}, {"type": "object", "maxProperties": MAX_NAMES}]}


def _object(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "maxProperties": MAX_NAMES,
        "propertyNames": {"maxLength": MAX_NAME},
        "additionalProperties": values,
    }


def _scalars(value: Any, depth: int) -> Iterator[object]:
    """All scalars of a JSON value. Raises ValueError where something is too deep, too large or no text."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it may be nested at most {MAX_DEPTH} deep")
    if isinstance(value, dict):
        if len(value) > MAX_NAMES or any(len(name) > MAX_NAME for name in value):
            raise ValueError(f"an object may have at most {MAX_NAMES} names of at most {MAX_NAME} characters")
        for name, item in value.items():
            check_text(name)
            yield from _scalars(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _scalars(item, depth + 1)
        yield None  # an empty array counts too
    else:
        if isinstance(value, str):
            check_text(value)
        elif isinstance(value, float) and not abs(value) <= 1e300:
            raise ValueError("a number in it is not finite or beyond 1e300")
        elif isinstance(value, int) and abs(value) > _MAX_INT:
            raise ValueError("an integer in it has more than 64 bits")
        yield value


def _variables(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("it must be an object")
    for number, _ in enumerate(_scalars(value, 0), 1):
        if number > MAX_VALUES:
            raise ValueError(f"it may hold at most {MAX_VALUES} values")
    return value


def _documents(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(document, dict) for document in value):
        raise ValueError("it must be an array of objects")
    if len(value) > MAX_DOCUMENTS:
        raise ValueError(f"it may hold at most {MAX_DOCUMENTS} documents")
    for document in value:
        if any(isinstance(item, list | dict) for item in document.values()):
            raise ValueError("a document's fields must be strings, numbers, booleans or null")
        list(_scalars(document, 0))
    return value


def document_texts(document: Mapping[str, Any]) -> list[str]:
    return [value for value in document.values() if isinstance(value, str)]


Variables = Annotated[dict[str, Any], PlainValidator(_variables), WithJsonSchema(_object(_ANY))]
_DOCUMENTS_SCHEMA = {"type": "array", "maxItems": MAX_DOCUMENTS, "items": _object({"anyOf": _SCALARS})}
Documents = Annotated[list[dict[str, Any]], PlainValidator(_documents), WithJsonSchema(_DOCUMENTS_SCHEMA)]


class TemplateFields(Body):
    """Variables of the chat template that a request sets."""

    chat_template_kwargs: Variables | None = None
    """Variables of the chat template by name, such as `{"enable_thinking": false}`: those that it reads."""
    documents: Documents | None = None
    """Texts to answer from, each an object such as `{"title": ..., "text": ...}`, for templates that read them."""

    def check_template(self, template: TemplateFacts) -> None:
        """Raises ApiError 400 for a variable that the template does not read."""
        for name in self.chat_template_kwargs or {}:
            if name not in template.variables:
                known = ", ".join(sorted(template.variables)) or "none"
                raise bad_request(
                    f"The model's chat template reads no '{name}'; what a request may set: {known}.",
                    f"chat_template_kwargs.{name}",
                )
        if self.documents and not template.reads_documents:
            raise not_supported("documents", "are not read by the model's chat template")

    def template_variables(self, template: TemplateFacts) -> dict[str, Any]:
        """For ChatTemplate.render, behind `check_template`."""
        documents = {"documents": self.documents} if self.documents else {}
        return {**(self.chat_template_kwargs or {}), **documents}


class EffortFields(TemplateFields):
    """How much a model is to think and to say: for templates that read it."""

    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """Handed to a chat template that reads it; one that reads `enable_thinking` instead learns whether it is "none"."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """Handed to a chat template that reads it."""

    def template_variables(self, template: TemplateFacts) -> dict[str, Any]:
        return {**self._efforts(template), **super().template_variables(template)}

    def without_effect(self, template: TemplateFacts, *, strict: bool) -> list[str]:
        """Fields that are set and that the template does not read. Raises ApiError 400 for one with `strict`."""
        read = self._efforts(template)
        names = []
        if self.reasoning_effort not in (None, "none") and not read.keys() & {"reasoning_effort", "enable_thinking"}:
            names.append("reasoning_effort")
        if self.verbosity is not None and "verbosity" not in read:
            names.append("verbosity")
        if strict and names:
            raise not_supported(names[0], "is not read by the model's chat template")
        return names

    def _efforts(self, template: TemplateFacts) -> Mapping[str, Any]:
        efforts: dict[str, Any] = {"reasoning_effort": self.reasoning_effort, "verbosity": self.verbosity}
        read = {name: value for name, value in efforts.items() if value is not None and name in template.variables}
        thinks = "enable_thinking" in template.variables and "reasoning_effort" not in template.variables
        if self.reasoning_effort is not None and thinks:
            read["enable_thinking"] = self.reasoning_effort != "none"
        return read
