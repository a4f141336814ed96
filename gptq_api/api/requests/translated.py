"""A body of another API as a chat completion request, and errors of the chat pipeline in the words of that API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from gptq_api.api.errors import ApiError, invalid_body
from gptq_api.api.requests.chat import ChatCompletionRequest
from gptq_api.api.requests.fields import MAX_UNKNOWN, printable, unknown_header
from gptq_api.api.tool_names import Toolbox


@dataclass(slots=True)
class Names:
    """Where what the chat pipeline knows by one name came from in the body that the client sent."""

    paths: dict[str, str] = field(default_factory=dict)
    """path in the chat request -> path in the client's body; holds for what lies below it as well"""

    def of(self, path: str) -> str:
        """The longest known beginning is replaced. Messages have no number: several may be one."""
        if path.startswith("messages["):
            return self.paths.get("messages", "messages")
        for end in sorted({len(path), *(i for i, char in enumerate(path) if char in ".[")}, reverse=True):
            if path[:end] in self.paths:
                return self.paths[path[:end]] + path[end:]
        return path

    @contextmanager
    def used(self) -> Iterator[None]:
        """Errors raised inside name the client's fields."""
        try:
            yield
        except ApiError as error:
            param = error.error["param"]
            if param is not None:
                renamed = self.of(param)
                error.error["message"] = error.error["message"].replace(f"'{param}'", f"'{renamed}'")
                error.error["param"] = renamed
            raise


@dataclass(slots=True)
class Translated:
    """What a conversion gives."""

    chat: ChatCompletionRequest
    names: Names
    tools: Toolbox
    skipped: list[str]
    """what had no effect"""
    dropped: str = ""
    """the name of a line that was taken out of the system prompt"""

    def headers(self) -> dict[str, str]:
        """Of the response: what had no effect."""
        told = unknown_header([printable(name) for name in self.skipped[:MAX_UNKNOWN]])
        return told | ({"x-dropped-system-line": self.dropped} if self.dropped else {})


def chat_request(fields: dict[str, Any], names: Names) -> ChatCompletionRequest:
    """Raises ApiError 400."""
    with names.used():
        try:
            return ChatCompletionRequest.model_validate(fields)
        except ValidationError as error:
            errors = [{**found, "loc": ("body", *found["loc"])} for found in error.errors()]
            raise invalid_body(errors, fields) from None
