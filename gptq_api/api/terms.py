"""On which terms a request is served, apart from what its answer says."""

from __future__ import annotations

from typing import NamedTuple


class Terms(NamedTuple):
    cache_salt: str | None = None
    """prompts share cached prefixes only with equal salts"""
    priority: int = 0
    """the lowest number is served first"""
    timeout_s: float | None = None
    """from the request's first byte to the last token; what is there by then is the answer"""
