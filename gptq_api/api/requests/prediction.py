"""OpenAI's predicted outputs: what the answer may look like, as a hint that changes nothing but how fast it comes.

OpenAI refuses it beside `n`, `logprobs`, penalties, `tools` and others; here it goes with every field, since a drafted
token counts only where it is the one that was sampled.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import ModelWrapValidatorHandler, PrivateAttr, model_validator

from gptq_api.api.requests.content import Content, unknown_in_parts
from gptq_api.api.requests.fields import MAX_UNKNOWN, Body, unrecognized


class Prediction(Body):
    """A text that the answer will resemble."""

    type: Literal["content"]
    content: Content

    _unknown_in_parts: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _look_at_parts(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        prediction = handler(value)
        content = value.get("content") if isinstance(value, dict) else None
        prediction._unknown_in_parts = unknown_in_parts(content) if isinstance(content, list) else []
        return prediction

    def unknown(self, *, strict: bool) -> list[str]:
        if strict and self._unknown_in_parts:
            raise unrecognized(f"prediction.{self._unknown_in_parts[0]}")
        return [*super().unknown(strict=strict), *self._unknown_in_parts][:MAX_UNKNOWN]


class PredictionFields(Body):
    prediction: Prediction | None = None
    """What the answer may look like, such as the file that it changes a little: where that is right, several tokens
    come in one step (`--speculate`). No token of the answer depends on it. What is longer than the context is cut, and
    an answer that follows a grammar (tools, `response_format`) makes no use of it."""

    def unknown(self, *, strict: bool) -> list[str]:
        nested = [] if self.prediction is None else self.prediction.unknown(strict=strict)
        return [*super().unknown(strict=strict), *(f"prediction.{name}" for name in nested)]
