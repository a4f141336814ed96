"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema

from gptq_api.api.errors import bad_request
from gptq_api.api.requests.constraints import ConstrainedFields
from gptq_api.api.requests.fields import MAX_TEXT, MAX_TOKEN, CountOrZero, check_text
from gptq_api.api.requests.prediction import PredictionFields
from gptq_api.api.requests.serving import ServingFields

MAX_IDS = 2**18
MAX_PROMPTS = 1024

_TEXT_SCHEMA = {"type": "string", "maxLength": MAX_TEXT}
_ID_SCHEMA = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN}
_IDS_SCHEMA = {"type": "array", "items": _ID_SCHEMA, "minItems": 1, "maxItems": MAX_IDS}


def _ids(value: list[Any]) -> list[int]:
    if len(value) > MAX_IDS:
        raise ValueError(f"it may hold at most {MAX_IDS} token ids")
    if not all(type(item) is int and 0 <= item <= MAX_TOKEN for item in value):  # bool is an int to isinstance
        raise ValueError("token ids must be integers of 0 or more")
    return value


def _prompt(value: Any) -> list[str | list[int]]:
    """A text, texts, ids or lists of ids -> a list of prompts."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise ValueError("it must be a string, an array of strings, an array of token ids or an array of those")
    if not value:
        raise ValueError("it must not be empty")
    if type(value[0]) is int:
        return [_ids(value)]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"it may hold at most {MAX_PROMPTS} prompts")
    prompts: list[str | list[int]] = []
    for item in value:
        if isinstance(item, str):
            if len(item) > MAX_TEXT:
                raise ValueError(f"a text may have at most {MAX_TEXT} characters")
            prompts.append(check_text(item))
        elif isinstance(item, list) and item:
            prompts.append(_ids(item))
        else:
            raise ValueError("each prompt must be a string or a non-empty array of token ids")
    return prompts


Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT_SCHEMA,
                {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
                _IDS_SCHEMA,
                {"type": "array", "items": _IDS_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        }
    ),
]


class CompletionRequest(PredictionFields, ServingFields, ConstrainedFields):
    usual_tokens = 16

    prompt: Prompts
    """A text, texts, token ids or lists of those."""
    max_tokens: CountOrZero | None = None
    """Default: 16 as at OpenAI, or what the context leaves."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """OpenAI takes up to 5."""
    echo: bool | None = None
    """Begin the answer with the prompt; with `logprobs` those of the prompt come too, and that of an end token. With
    `max_tokens` 0 they are all that is computed."""
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    """Sample this many and return the `n` with the highest mean log-probability per token."""
    add_special_tokens: bool | None = None
    """Begin a text prompt with the BOS token. Default: true."""

    @property
    def echoes_logprobs(self) -> bool:
        return bool(self.echo) and self.logprobs is not None

    def check(self) -> None:
        """What one field cannot say alone. Raises ApiError 400."""
        self.check_prompt_logprobs()
        if self.best_of is not None:
            if self.best_of < self.num_choices:
                raise bad_request(f"'best_of' must not be less than 'n' ({self.num_choices}).", "best_of")
            if self.stream and self.best_of > self.num_choices:
                raise bad_request("'best_of' cannot be streamed.", "best_of")
