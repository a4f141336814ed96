"""Fields that say on which terms a request is served, and the headers that say the same for clients which cannot add
fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from annotated_types import Ge, Le

from gptq_api.api.errors import bad_request
from gptq_api.api.requests.fields import SamplingFields
from gptq_api.api.terms import Terms

MAX_PRIORITY = 1000
PRIORITY_HEADER = "x-priority"
MIN_TIMEOUT_S, MAX_TIMEOUT_S = 0.001, 86400
TIMEOUT_HEADER = "x-request-timeout"
_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")

Priority = Annotated[int, Ge(-MAX_PRIORITY), Le(MAX_PRIORITY)]

Timeout = Annotated[float, Ge(MIN_TIMEOUT_S), Le(MAX_TIMEOUT_S)]


class ServingFields(SamplingFields):
    priority: Priority | None = None
    """The lowest number is served first, and loses its memory last where memory is short. Default 0; numbers below it
    go before the caller's other requests, not before those of other callers. The header `X-Priority` says it too, and
    the field wins."""
    timeout: Timeout | None = None
    """Seconds for waiting, prompt and answer together. An answer that is not complete by then ends where it is, with
    `finish_reason` "length" and `stop_reason` "deadline"; without a token by then, it is a 504. The header
    `X-Request-Timeout` says it too, and the field wins."""

    return_token_ids: bool | None = None
    """Beside the text the ids: `token_ids` of each choice, of all tokens that usage counts (in a stream, those that are
    new with a chunk), and `prompt_token_ids`."""

    def terms(self, headers: Mapping[str, str]) -> Terms:
        """`headers`: of the request. Raises ApiError 400 for one that is wrong."""
        priority, timeout_s = self.priority, self.timeout
        if priority is None and PRIORITY_HEADER in headers:
            priority = _priority(headers[PRIORITY_HEADER])
        if timeout_s is None and TIMEOUT_HEADER in headers:
            timeout_s = _timeout_s(headers[TIMEOUT_HEADER])
        return Terms(self.cache_salt, priority or 0, timeout_s)


def _priority(text: str) -> int:
    if not _INTEGER.fullmatch(text) or abs(int(text)) > MAX_PRIORITY:
        raise bad_request(
            f"Invalid value for the header 'X-Priority': it must be an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}.",
            "X-Priority",
        )
    return int(text)


def _timeout_s(text: str) -> float:
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = 0.0
    if not MIN_TIMEOUT_S <= timeout_s <= MAX_TIMEOUT_S:
        raise bad_request(
            "Invalid value for the header 'X-Request-Timeout': it must be a number of seconds from "
            f"{MIN_TIMEOUT_S} to {MAX_TIMEOUT_S}.",
            "X-Request-Timeout",
        )
    return timeout_s
