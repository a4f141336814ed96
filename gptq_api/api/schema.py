"""What HTTP asks for. Responses have no models: their bytes are built in shapes.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from gptq_api.api.errors import ApiError, bad_request, not_supported
from gptq_api.api.schema_fields import (
    MAX_TEXT,
    Body,
    Choices,
    Count,
    CountOrZero,
    LogitBias,
    Metadata,
    Name,
    Penalty,
    Prompts,
    Repetition,
    Seed,
    Share,
    Stop,
    StopTokenIds,
    Temperature,
    Text,
    TokenId,
    TopK,
    check_text,
)
from gptq_api.text.chat_template import joined_parts

MAX_PARTS = 1024


class StreamOptions(Body):
    include_usage: bool = False
    """A last chunk with the token counts."""
    continuous_usage_stats: bool = False
    """Token counts so far in every chunk."""
    include_obfuscation: bool = False
    """Accepted; chunks are never padded."""


class SamplingFields(Body):
    """What both generation endpoints share."""

    model: Name | None = None
    """A name from /v1/models. Default: the model that is served."""
    temperature: Temperature | None = None
    """0 is greedy. Default 1."""
    top_p: Share | None = None
    top_k: TopK | None = None
    """0 or -1: off."""
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    seed: Seed | None = None
    """The same seed gives the same text, whoever else is being served (on a GPU: but for ties within rounding)."""
    n: Choices | None = None
    max_tokens: CountOrZero | None = None
    """Default: what the context leaves."""
    min_tokens: CountOrZero | None = None
    stop: Stop = Field(default_factory=list)
    stop_token_ids: StopTokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: LogitBias | None = None
    """Token id -> what is added to its logit; -100 bans it."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Name | None = None
    """Prompts share cached prefixes only with equal salts (and, always, equal API keys)."""
    user: Name | None = None
    """Accepted, without effect; so are the five below."""
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    prompt_cache_retention: Name | None = None

    def unknown(self, *, strict: bool) -> list[str]:
        nested = [] if self.stream_options is None else self.stream_options.unknown(strict=strict)
        return [*super().unknown(strict=strict), *(f"stream_options.{name}" for name in nested)]

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def answer_limit(self) -> tuple[int | None, str]:
        """The most tokens of one answer, and the field that said so."""
        return self.max_tokens, "max_tokens"


def _content(value: Any) -> str | None:
    """A string, or text parts, which become one."""
    if value is None or isinstance(value, str):
        if value is not None and len(value) > MAX_TEXT:
            raise ValueError(f"it may have at most {MAX_TEXT} characters")
        return value if value is None else check_text(value)
    if not isinstance(value, list):
        raise ValueError("it must be a string or an array of text parts")
    if len(value) > MAX_PARTS:
        raise ValueError(f"it may hold at most {MAX_PARTS} parts")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError('only parts of type "text" are supported by this model')
        if not isinstance(part.get("text"), str):
            raise ValueError('a text part needs a string "text"')
        check_text(part["text"])
    return joined_parts(value)


_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"type": "string", "enum": ["text"]}, "text": {"type": "string", "maxLength": MAX_TEXT}},
}
Content = Annotated[
    str | None,
    PlainValidator(_content),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "maxLength": MAX_TEXT},
                {"type": "array", "items": _PART, "maxItems": MAX_PARTS},
                {"type": "null"},
            ]
        }
    ),
]


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is the newer name of `system`."""
    content: Content = None
    name: Name | None = None
    """Handed to the chat template."""

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None:
            raise ValueError("a message needs content")
        return self

    def rendered(self) -> dict[str, str]:
        """What the chat template sees."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}
        return message if self.name is None else {**message, "name": self.name}


_MESSAGE_REFUSED = ("tool_calls", "tool_call_id", "function_call", "audio")


def check_messages(messages: list[ChatMessage], *, strict: bool) -> list[str]:
    """Fields of messages nobody here knows. Raises ApiError 400 for those that would be ignored knowingly.

    SDK users send an assistant's message back as they got it: nulls and empty lists are fine.
    """
    unknown = []
    for index, message in enumerate(messages):
        for name, value in (message.model_extra or {}).items():
            if value in (None, [], ""):
                continue
            if name in _MESSAGE_REFUSED:
                raise not_supported(f"messages[{index}].{name}")
            unknown.append(name)
    if strict and unknown:
        raise bad_request("Unrecognized field of a message.", "messages", "unknown_parameter")
    return ["messages"] if unknown else []


class ChatCompletionRequest(SamplingFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: Count | None = None
    """The newer name of max_tokens; wins."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    """Begin an answer after the last message. Default true."""
    continue_final_message: bool | None = None
    """Go on with the last message, which is the assistant's."""
    parallel_tool_calls: bool | None = None
    """Accepted, without effect: there are no tools."""

    @property
    def answer_limit(self) -> tuple[int | None, str]:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"

    def check(self) -> None:
        """What one field cannot say alone. Raises ApiError 400."""
        if self.answer_limit[0] == 0:
            raise bad_request("Invalid value for 'max_tokens': it must be 1 or more, got 0.", "max_tokens")
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


class CompletionRequest(SamplingFields):
    prompt: Prompts
    """A text, texts, token ids or lists of those."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    """Begin the answer with the prompt."""
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    """Sample this many and return the `n` with the highest mean log-probability per token."""
    add_special_tokens: bool | None = None
    """Begin a text prompt with the BOS token. Default: true."""

    def check(self) -> None:
        """What one field cannot say alone. Raises ApiError 400."""
        if self.echo and self.logprobs is not None:
            raise ApiError(
                400,
                "'echo' together with 'logprobs' is not supported yet; leave one of them out.",
                param="echo",
                code="unsupported_parameter",
            )
        if self.best_of is not None:
            if self.best_of < self.num_choices:
                raise bad_request(f"'best_of' must not be less than 'n' ({self.num_choices}).", "best_of")
            if self.stream and self.best_of > self.num_choices:
                raise bad_request("'best_of' cannot be streamed.", "best_of")


class TokenizeRequest(Body):
    """A `prompt`, or `messages` to be rendered first."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["prompt"]}, {"required": ["messages"]}]})

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    """Begin with the BOS token. Default true for a prompt; a chat template writes its own."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2**18, fail_fast=True)]
