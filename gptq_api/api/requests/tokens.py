"""The bodies of POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from gptq_api.api.requests.chat import ChatMessage
from gptq_api.api.requests.fields import Body, Name, Text, TokenId
from gptq_api.api.requests.template import TemplateFields

_TEXTS = ("prompt", "messages", "content")


class TokenizeRequest(TemplateFields):
    """A `prompt`, or `messages` to be rendered first; or, as llama.cpp has it, a `content`."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": [name]} for name in _TEXTS]})

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    """Begin with the BOS token. Default true for a prompt; a chat template writes its own."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    content: Text | None = None
    """The answer is llama.cpp's, and so are the three below."""
    add_special: bool | None = None
    """Begin with the BOS token. Default false."""
    parse_special: bool | None = None
    """Take the spelling of a control token for the token. Default true."""
    with_pieces: bool | None = None
    """Answer objects with the id and its text, or its bytes where those are no text."""

    @property
    def given(self) -> list[str]:
        """Which of the three texts are there."""
        return [name for name in _TEXTS if getattr(self, name) is not None]


class DetokenizeRequest(Body):
    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2**18, fail_fast=True)]
