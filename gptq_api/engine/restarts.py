"""What lies between two lives of the engine: whether there may be another, and what it has in common with the last."""

from __future__ import annotations

import time
from collections import deque

import msgspec

from gptq_api.types import EngineStats, Ready

WINDOW_S = 600.0

_SAME = ("checkpoint", "vocab_size", "eos_token_ids", "max_model_len", "device", "dtype")
"""What requests, the tokenizer and seeds rely on"""


class Restarts:
    """At most so many within WINDOW_S."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._times: deque[float] = deque()  # of the last restarts, time.monotonic()

    def take(self) -> bool:
        """Whether the engine may be started once more now, which counts."""
        now = time.monotonic()
        while self._times and now - self._times[0] > WINDOW_S:
            self._times.popleft()
        if len(self._times) >= self._most:
            return False
        self._times.append(now)
        return True

    def end(self) -> None:
        """No more of them."""
        self._most = 0


def another_model(before: Ready, after: Ready) -> str | None:
    """Why an engine cannot take the place of the one before; None where it can."""
    for name in _SAME:
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            return f"the engine came back with another model: its {name} was {old} and is {new}; start the server anew"
    return None


def continued(before: EngineStats, now: EngineStats) -> EngineStats:
    """The state of this life's engine, and the counters of all lives."""
    return msgspec.structs.replace(
        now,
        num_preemptions=before.num_preemptions + now.num_preemptions,
        num_prefix_queries=before.num_prefix_queries + now.num_prefix_queries,
        num_prefix_hits=before.num_prefix_hits + now.num_prefix_hits,
        num_log_lines_dropped=before.num_log_lines_dropped + now.num_log_lines_dropped,
        num_drafts=before.num_drafts + now.num_drafts,
        num_draft_tokens=before.num_draft_tokens + now.num_draft_tokens,
        num_accepted_tokens=before.num_accepted_tokens + now.num_accepted_tokens,
        num_kv_events_dropped=before.num_kv_events_dropped + now.num_kv_events_dropped,
    )
