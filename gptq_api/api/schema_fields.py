"""The bounds of request fields, once. Every field that exists has a smallest and a largest value: a test walks the
OpenAPI document and fails on one that has not.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Annotated, Any

from annotated_types import Ge, Le, Len
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema

from gptq_api.api.errors import bad_request, not_supported

MAX_TEXT = 8 * 2**20
"""characters of one text; the body limit is what usually bounds it"""
MAX_STOP = 16
MAX_STOP_TEXT = 512
MAX_IDS = 2**18
MAX_BIAS = 1024
MAX_PROMPTS = 1024
MAX_TOKEN = 2**31 - 1


def check_text(value: str) -> str:
    """JSON can spell half a surrogate pair; no encoder or tokenizer can."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair, which is not text") from None
    return value


Text = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(check_text)]
Name = Annotated[str, Field(max_length=512), AfterValidator(check_text)]
TokenId = Annotated[int, Ge(0), Le(MAX_TOKEN)]
Count = Annotated[int, Ge(1), Le(MAX_TOKEN)]
CountOrZero = Annotated[int, Ge(0), Le(MAX_TOKEN)]
Temperature = Annotated[float, Ge(0), Le(2)]
Share = Annotated[float, Ge(0), Le(1)]
TopK = Annotated[int, Ge(-1), Le(MAX_TOKEN)]
Penalty = Annotated[float, Ge(-2), Le(2)]
Repetition = Annotated[float, Ge(0.01), Le(10)]
"""Not any number above 0: at 1e-38 a logit divided by it overflows. With these bounds an adjusted logit x is at most
100 * (|x| + 100) + 2 + 2 * count, and the count of a token is below 2**31: finite in float32 for every |x| up to 1e36.
Temperatures need no such bound, since the sampler clamps 1 / temperature and looks at differences to the best."""
Seed = Annotated[int, Ge(-(2**63)), Le(2**63 - 1)]
Choices = Annotated[int, Ge(1), Le(128)]
Bias = Annotated[float, Ge(-100), Le(100)]
BiasKey = Annotated[str, Field(max_length=10, pattern=r"^[0-9]+$")]


def _few(value: Any) -> Any:
    """Before the entries are looked at: half a million wrong ones are half a million error objects otherwise."""
    if isinstance(value, dict) and len(value) > MAX_BIAS:
        raise ValueError(f"it may have at most {MAX_BIAS} entries")
    return value


LogitBias = Annotated[dict[BiasKey, Bias], Len(0, MAX_BIAS), BeforeValidator(_few)]
StopTokenIds = Annotated[list[TokenId], Field(max_length=128, fail_fast=True)]
Metadata = Annotated[dict[Annotated[str, Len(0, 64)], Annotated[str, Len(0, 512)]], Len(0, 16), BeforeValidator(_few)]


def _stop(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("it must be a string or an array of strings")
    if len(texts) > MAX_STOP:
        raise ValueError(f"it may hold at most {MAX_STOP} strings")
    if not all(0 < len(text) <= MAX_STOP_TEXT for text in texts):
        raise ValueError(f"each stop string must have 1 to {MAX_STOP_TEXT} characters")
    return [check_text(text) for text in texts]


_TEXT_SCHEMA = {"type": "string", "maxLength": MAX_TEXT}
_ID_SCHEMA = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN}
_IDS_SCHEMA = {"type": "array", "items": _ID_SCHEMA, "minItems": 1, "maxItems": MAX_IDS}
_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_TEXT}
Stop = Annotated[
    list[str],
    PlainValidator(_stop),
    WithJsonSchema(
        {"anyOf": [_STOP_SCHEMA, {"type": "array", "items": _STOP_SCHEMA, "maxItems": MAX_STOP}, {"type": "null"}]}
    ),
]


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

_NOTHING: tuple[Any, ...] = (None, False, [], {})
_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": _NOTHING,
    "tool_choice": (None, "none"),
    "functions": _NOTHING,
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": _NOTHING,
    "guided_json": _NOTHING,
    "guided_regex": _NOTHING,
    "guided_choice": _NOTHING,
    "guided_grammar": _NOTHING,
    "grammar": (None, ""),
    "json_schema": _NOTHING,
    "modalities": (None, ["text"]),
    "audio": _NOTHING,
    "prediction": _NOTHING,
    "web_search_options": _NOTHING,
    "reasoning_effort": (None, "none"),
    "chat_template": _NOTHING,
    "chat_template_kwargs": _NOTHING,
    "documents": _NOTHING,
    "priority": (None, 0),
    "timeout": _NOTHING,
    "truncate_prompt_tokens": _NOTHING,
    "return_token_ids": _NOTHING,
    "return_tokens_as_token_ids": _NOTHING,
    "prompt_logprobs": _NOTHING,
    "use_beam_search": _NOTHING,
    "length_penalty": (None, 1, 1.0),
    "suffix": (None, ""),
    "echo": _NOTHING,
    "best_of": (None, 1),
    "bad_words": _NOTHING,
    "allowed_token_ids": _NOTHING,
    "repeat_penalty": (None, 1, 1.0),
    "typical_p": (None, 1, 1.0),
    "mirostat": (None, 0),
}
"""Fields of OpenAI and its peers that are known and not honoured, with the values that mean "off"."""


class Body(BaseModel):
    """A request body: strict types, finite numbers, unknown fields kept for `check_extra`."""

    model_config = ConfigDict(
        strict=True, allow_inf_nan=False, extra="allow", use_attribute_docstrings=True, protected_namespaces=()
    )

    def unknown(self, *, strict: bool) -> list[str]:
        """Names of fields nobody here knows. Raises ApiError 400 for one that is known and not honoured, or, with
        `strict`, for any."""
        extra: Mapping[str, Any] = self.model_extra or {}
        for name in sorted(_REFUSED.keys() & extra.keys()):
            # `True == 1`, so types are compared too
            if not any(type(extra[name]) is type(off) and extra[name] == off for off in _REFUSED[name]):
                raise not_supported(name)
        unknown = [_printable(name) for name in islice((name for name in extra if name not in _REFUSED), 16)]
        if strict and unknown:
            raise bad_request(f"Unrecognized request argument: {unknown[0]}.", unknown[0], "unknown_parameter")
        return unknown


def _printable(name: str) -> str:
    """For a header and an error: 1 to 64 harmless ASCII characters, none of them a space."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-.") else "?" for c in name[:64]) or "(empty)"


def unknown_header(unknown: list[str]) -> dict[str, str]:
    """The response header that says which fields of the request, as `Body.unknown` spells them, had no effect."""
    return {"x-unsupported-params": ", ".join(unknown)} if unknown else {}
