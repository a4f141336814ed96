"""The fields of request bodies: their bounds, once, and those that both generation endpoints share.

Every field that exists has a smallest and a largest value: a test walks the OpenAPI document and fails on one that has
not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Le, Len
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema

from gptq_api.api.errors import ApiError, bad_request
from gptq_api.api.requests.refused import REFUSED, refuse
from gptq_api.text.stream import TextStream
from gptq_api.text.tokens import Tokens

MAX_TEXT = 8 * 2**20
"""characters of one text; the body limit is what usually bounds it"""
MAX_STOP = 16
MAX_STOP_TEXT = 512
MAX_BIAS = 1024
MAX_TOKEN = 2**31 - 1
MAX_UNKNOWN = 16
"""names of unknown fields that are told, of a body and of its messages"""
MAX_LOGGED = 512
"""characters of what a caller says that the log keeps"""


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


_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_TEXT}
Stop = Annotated[
    list[str],
    PlainValidator(_stop),
    WithJsonSchema(
        {"anyOf": [_STOP_SCHEMA, {"type": "array", "items": _STOP_SCHEMA, "maxItems": MAX_STOP}, {"type": "null"}]}
    ),
]


class Body(BaseModel):
    """A request body: strict types, finite numbers, unknown fields kept for `unknown`."""

    model_config = ConfigDict(
        strict=True, allow_inf_nan=False, extra="allow", use_attribute_docstrings=True, protected_namespaces=()
    )

    def unknown(self, *, strict: bool) -> list[str]:
        """Names of fields nobody here knows. Raises ApiError 400 for one that is known and not honoured, or, with
        `strict`, for any."""
        extra: Mapping[str, Any] = self.model_extra or {}
        refuse(extra)
        unknown = [printable(name) for name in islice((name for name in extra if name not in REFUSED), MAX_UNKNOWN)]
        if strict and unknown:
            raise unrecognized(unknown[0])
        return unknown


class StreamOptions(Body):
    include_usage: bool = False
    """A last chunk with the token counts."""
    continuous_usage_stats: bool = False
    """Token counts so far in every chunk."""
    include_obfuscation: bool = False
    """Accepted; chunks are never padded."""


class SamplingFields(Body):
    """What both generation endpoints share."""

    usual_tokens: ClassVar[int | None] = None
    """of an answer, where nobody says how many; None: what the context leaves"""

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
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """vLLM's: of each token of the prompt its logprob and rank, and so many most likely ones. Not in a stream."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Name | None = None
    """Prompts share cached prefixes only with equal salts (and, always, equal API keys)."""
    user: Name | None = None
    """For the request's line in the log, as are `metadata`, `store`, `safety_identifier` and `prompt_cache_key`."""
    metadata: Metadata | None = None
    store: bool | None = None
    """Nothing is stored."""
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    """Who shares cached prefixes is up to `cache_salt` and API keys."""
    prompt_cache_retention: Name | None = None
    """Accepted, without effect: prefixes are cached for as long as there is room."""
    service_tier: Name | None = None
    """Accepted; there is one tier, and the answer says "default"."""

    def unknown(self, *, strict: bool) -> list[str]:
        nested = [] if self.stream_options is None else self.stream_options.unknown(strict=strict)
        return [*super().unknown(strict=strict), *(f"stream_options.{name}" for name in nested)]

    def notes(self) -> dict[str, object]:
        """What the caller said of the request for its line in the log: bounded and printable."""
        said: dict[str, object] = {
            "user": self.user,
            "safety_identifier": self.safety_identifier,
            "prompt_cache_key": self.prompt_cache_key,
            "metadata": None if self.metadata is None else json.dumps(self.metadata, ensure_ascii=False),
        }
        notes: dict[str, object] = {name: _loggable(value) for name, value in said.items() if isinstance(value, str)}
        return notes if self.store is None else {**notes, "store": self.store}

    @property
    def num_choices(self) -> int:
        return self.n or 1

    def check_prompt_logprobs(self) -> None:
        """Raises ApiError 400."""
        if self.stream and self.prompt_logprobs is not None:
            raise bad_request("'prompt_logprobs' cannot be streamed.", "prompt_logprobs")

    @property
    def usage_at_end(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_chunks(self) -> bool:
        """Whether every chunk of a stream has the token counts so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def text_streams(
        self,
        tokenizer: Tokens,
        *,
        more_stop: Sequence[str] = (),
        continues: bool,
        shown: frozenset[int] = frozenset(),
        stops: bool = True,
    ) -> Callable[[], TextStream]:
        """What makes the text of each choice. `more_stop`: stop strings besides the request's own; `shown`: control
        tokens that stand in it in any case; `stops`: whether it looks for stop strings."""
        return partial(
            TextStream,
            tokenizer,
            stop=[*self.stop, *more_stop] if stops else [],
            include_stop=bool(self.include_stop_str_in_output),
            skip_special=self.skip_special_tokens is not False,
            continues=continues,
            shown=shown,
        )

    @property
    def answer_limit(self) -> tuple[int | None, str]:
        """The most tokens of one answer, and the field that said so."""
        return self.max_tokens, "max_tokens"


def _loggable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_LOGGED])


def unrecognized(name: str) -> ApiError:
    return bad_request(f"Unrecognized request argument: {name}.", name, "unknown_parameter")


def printable(name: str) -> str:
    """For a header and an error: 1 to 64 harmless ASCII characters, none of them a space."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-.") else "?" for c in name[:64]) or "(empty)"


def unknown_header(unknown: list[str]) -> dict[str, str]:
    """The response header that says which fields of the request, as `Body.unknown` spells them, had no effect."""
    return {"x-unsupported-params": ", ".join(unknown)} if unknown else {}
