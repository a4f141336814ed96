"""What a named key may use, and has used.

A token bucket for requests and one for tokens: prompt and longest answer are taken when a request is admitted, and what
was not used is given back when it ends. A request that would take more than a minute's tokens takes them all, and what
it uses beyond them is owed. The caller reads the clock (time.monotonic()).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from gptq_api.edge.keys import Key
from gptq_api.rates import Bucket, Departures

Kind = Literal["requests", "tokens", "concurrency"]
SHORTEST_WAIT_S, LONGEST_WAIT_S = 0.05, 60.0
"""of one for a seat among the concurrent ones"""


class LimitReached(Exception):
    """The text says which limit of which key, and when to come again."""

    def __init__(self, kind: Kind, message: str, retry_after_s: float) -> None:
        super().__init__(f"{message}. Please try again in {spelled(retry_after_s)}.")
        self.kind, self.retry_after_s = kind, retry_after_s


@dataclass(slots=True)
class Usage:
    """Running totals since start."""

    requests: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    refused: dict[Kind, int] = field(default_factory=lambda: {"requests": 0, "tokens": 0, "concurrency": 0})


class Account:
    """Of one named key; it outlives changes of the key's limits."""

    def __init__(self, key: Key, now: float) -> None:
        assert key.name is not None
        self.name = key.name
        self.usage = Usage()
        self.num_concurrent = 0
        self._most_concurrent: int | None = None
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self._departures = Departures()
        self.change(key, now)

    def change(self, key: Key, now: float) -> None:
        """The key's limits are these from now on."""
        self._most_concurrent = key.max_concurrent
        self._requests = _changed(self._requests, key.requests_per_minute, now)
        self._tokens = _changed(self._tokens, key.tokens_per_minute, now)

    def begin(self, now: float) -> None:
        """A request comes; it will `end`, or is `give_up`. Raises LimitReached."""
        if self._most_concurrent is not None and self.num_concurrent >= self._most_concurrent:
            wait_s = min(max(self._departures.interval_s(now), SHORTEST_WAIT_S), LONGEST_WAIT_S)
            self._refuse("concurrency", f"concurrent requests: Limit {self._most_concurrent}", wait_s)
        if self._requests is not None:
            if wait_s := self._requests.wait_s(1, now):
                limit = f"requests per min (RPM): Limit {self._requests.per_minute}"
                self._refuse("requests", limit, wait_s)
            self._requests.take(1, now)
        if not self.num_concurrent:
            self._departures.begin(now)
        self.num_concurrent += 1

    def end(self, now: float) -> None:
        """A request was answered."""
        self.num_concurrent -= 1
        self._departures.note(now, 1)

    def give_up(self, now: float, *, counts: bool) -> None:
        """A request is not answered; `counts`: for a reason that is its own."""
        self.num_concurrent -= 1
        if self._requests is not None and not counts:
            self._requests.give_back(1, now)

    def reserve(self, num_tokens: int, now: float) -> int:
        """Tokens for a prompt and its longest answer; how many were taken. Raises LimitReached."""
        if self._tokens is None:
            return 0
        if wait_s := self._tokens.wait_s(num_tokens, now):
            left = max(0, math.floor(self._tokens.level(now)))
            limit = f"tokens per min (TPM): Limit {self._tokens.per_minute}, Left {left}, Requested {num_tokens}"
            self._refuse("tokens", limit, wait_s)
        reserved = min(num_tokens, self._tokens.per_minute)
        self._tokens.take(reserved, now)
        return reserved

    def settle(self, reserved: int, prompt_tokens: int, generation_tokens: int, now: float) -> None:
        """The request has ended: what it did not use is free again."""
        self.usage.prompt_tokens += prompt_tokens
        self.usage.generation_tokens += generation_tokens
        if self._tokens is not None:
            self._tokens.give_back(reserved - prompt_tokens - generation_tokens, now)

    def has_spare(self, now: float) -> bool:
        """Whether a request in the background may come, which leaves half of each limit to others."""
        most = self._most_concurrent
        if most is not None and self.num_concurrent >= max(1, most // 2):
            return False
        buckets = (bucket for bucket in (self._requests, self._tokens) if bucket is not None)
        return all(bucket.level(now) >= bucket.per_minute / 2 for bucket in buckets)

    def headers(self, now: float) -> list[tuple[bytes, bytes]]:
        """x-ratelimit-*, as OpenAI spells them."""
        headers = []
        for kind, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                left = max(0, math.floor(bucket.level(now)))
                headers += [
                    (f"x-ratelimit-limit-{kind}".encode(), b"%d" % bucket.per_minute),
                    (f"x-ratelimit-remaining-{kind}".encode(), b"%d" % left),
                    (f"x-ratelimit-reset-{kind}".encode(), spelled(bucket.full_s(now)).encode()),
                ]
        return headers

    def _refuse(self, kind: Kind, limit: str, wait_s: float) -> None:
        self.usage.refused[kind] += 1
        raise LimitReached(kind, f"Rate limit reached for key {self.name} on {limit}", wait_s)


def _changed(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now)
    bucket.change(per_minute, now)
    return bucket


def spelled(seconds: float) -> str:
    """As OpenAI spells times: 120ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, tenths = divmod(math.ceil(seconds * 10), 600)
    return (f"{minutes}m" if minutes else "") + f"{tenths / 10:g}s"
