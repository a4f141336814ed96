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
_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")

Priority = Annotated[int, Ge(-MAX_PRIORITY), Le(MAX_PRIORITY)]


class ServingFields(SamplingFields):
    priority: Priority | None = None
    """The lowest number is served first, and loses its memory last where memory is short. Default 0; the header
    `X-Priority` says it too, and the field wins."""

    def terms(self, headers: Mapping[str, str]) -> Terms:
        """`headers`: of the request. Raises ApiError 400 for one that is wrong."""
        priority = _priority(headers.get(PRIORITY_HEADER, "0")) if self.priority is None else self.priority
        return Terms(self.cache_salt, priority)


def _priority(text: str) -> int:
    if not _INTEGER.fullmatch(text) or abs(int(text)) > MAX_PRIORITY:
        raise bad_request(
            f"Invalid value for the header 'X-Priority': it must be an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}.",
            "X-Priority",
        )
    return int(text)
