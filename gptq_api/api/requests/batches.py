"""The body of POST /v1/batches."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from gptq_api.api.requests.fields import Body, Metadata, Name
from gptq_api.batch.lines import ENDPOINTS

SHORTEST_KEPT_S, LONGEST_KEPT_S = 3600, 30 * 86400
"""files, seconds"""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WINDOW = re.compile(r"([1-9][0-9]{0,6})([smhd])")
LONGEST_WINDOW_S = 30 * 86400


def window_s(window: str) -> int:
    """`24h` -> seconds. Raises ValueError."""
    match = _WINDOW.fullmatch(window)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < seconds <= LONGEST_WINDOW_S:
        raise ValueError("it must be a time such as '24h', of at most '30d', in s, m, h or d")
    return seconds


def _window(window: str) -> str:
    window_s(window)
    return window


Kept = Annotated[int, Ge(SHORTEST_KEPT_S), Le(LONGEST_KEPT_S)]


class ExpiresAfter(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    anchor: Literal["created_at"]
    seconds: Kept


class BatchRequest(Body):
    input_file_id: Name
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]
    """What every line of the file asks."""
    completion_window: Annotated[
        str,
        Field(max_length=8),
        AfterValidator(_window),
        WithJsonSchema({"type": "string", "maxLength": 8, "pattern": f"^{_WINDOW.pattern}$"}),
    ] = "24h"
    """When it ends, finished or not: OpenAI's `24h`, or any other number of s, m, h or d, at most `30d`."""
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None
    """How long its files are kept. Default: 30 days."""


assert set(ENDPOINTS) == set(BatchRequest.model_fields["endpoint"].annotation.__args__)  # type: ignore[union-attr]
