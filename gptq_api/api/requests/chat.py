"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from gptq_api.api.errors import bad_request, not_supported
from gptq_api.api.requests.content import ContentOrNone, unknown_in_parts
from gptq_api.api.requests.fields import MAX_UNKNOWN, Body, Count, Name, Text, printable, unrecognized
from gptq_api.api.requests.prediction import PredictionFields
from gptq_api.api.requests.refused import REFUSED_IN_MESSAGES
from gptq_api.api.requests.serving import ServingFields
from gptq_api.api.requests.template import EffortFields
from gptq_api.api.requests.tools import MAX_TOOLS, ToolCall, ToolFields


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    """`developer` is the newer name of `system`."""
    content: ContentOrNone = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """What the assistant called."""
    tool_call_id: Name | None = None
    """Of the call that this is the result of."""
    reasoning_content: Text | None = None
    """The assistant's thoughts, for templates that show them."""
    reasoning: Text | None = None
    """Another name of that."""
    name: Name | None = None
    """Handed to the chat template."""

    _unknown_in_parts: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _look_at_parts(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """The parts become one string; what nobody knows in them is kept here."""
        message = handler(value)
        content = value.get("content") if isinstance(value, dict) else None
        message._unknown_in_parts = unknown_in_parts(content) if isinstance(content, list) else []
        return message

    @property
    def unknown_in_parts(self) -> list[str]:
        """Paths within the message, at most MAX_UNKNOWN."""
        return self._unknown_in_parts

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message of the assistant has tool_calls")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of a tool needs its tool_call_id")
        return self

    def rendered(self) -> dict[str, Any]:
        """What the chat template sees."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        message["content"] = self.content or ""
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id
        if thoughts := self.reasoning_content or self.reasoning:
            message["reasoning_content"] = thoughts
        return message

    @property
    def texts(self) -> list[str]:
        """All that takes room in a prompt."""
        return [self.content or "", *(call.function.arguments for call in self.tool_calls or ())]


def check_messages(messages: list[ChatMessage], *, strict: bool) -> list[str]:
    """Fields of messages and of their parts that nobody here knows, by their paths. Raises ApiError 400 for those that
    would be ignored knowingly.

    SDK users send an assistant's message back as they got it: nulls and empty lists are fine.
    """
    unknown: list[str] = []
    for index, message in enumerate(messages):
        for name, value in (message.model_extra or {}).items():
            if value in (None, [], ""):
                continue
            if name in REFUSED_IN_MESSAGES:
                raise not_supported(f"messages[{index}].{name}")
            if len(unknown) < MAX_UNKNOWN:
                unknown.append(f"messages[{index}].{printable(name)}")
        unknown += [f"messages[{index}].{path}" for path in message.unknown_in_parts[: MAX_UNKNOWN - len(unknown)]]
    if strict and unknown:
        raise unrecognized(unknown[0])
    return unknown


class ChatCompletionRequest(PredictionFields, EffortFields, ServingFields, ToolFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: Count | None = None
    """The newer name of max_tokens; wins."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    """Begin an answer after the last message. Default true."""
    continue_final_message: bool | None = None
    """Go on with the last message, which is the assistant's."""

    def unknown(self, *, strict: bool) -> list[str]:
        return [*super().unknown(strict=strict), *check_messages(self.messages, strict=strict)]

    @property
    def answer_limit(self) -> tuple[int | None, str]:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"

    def check(self) -> None:
        """What one field cannot say alone. Raises ApiError 400."""
        self.check_tools()
        if self.answer_limit[0] == 0:
            raise bad_request("Invalid value for 'max_tokens': it must be 1 or more, got 0.", "max_tokens")
        self.check_prompt_logprobs()
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise bad_request(
                    "'continue_final_message' and 'add_generation_prompt' exclude each other.", "continue_final_message"
                )
            if self.messages[-1].role != "assistant":
                raise bad_request(
                    "'continue_final_message' needs a last message of the assistant.", "continue_final_message"
                )
