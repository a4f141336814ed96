"""What a load test asks for, in closed loop (so many users) and open loop (so many requests a second), and what was
felt."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

from gptq_api.bench.http_client import Endpoint, LoadError, TimedCall

SHAREGPT = ((215, 1.4), (198, 1.0))
"""(mean, sigma of the logarithm) of prompt and answer: the means are those of vLLM's sample of ShareGPT (215,196 and
198,343 tokens in 1,000 requests), the shape is log-normal, which is close to it"""
LONGEST, SHORTEST = 1024, 4
"""tokens; vLLM leaves out what is longer or shorter"""
_WORDS = [
    *("the", "of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as", "with", "his"),
    *(
        "they",
        "at",
        "be",
        "this",
        "have",
        "from",
        "or",
        "one",
        "had",
        "by",
        "word",
        "but",
        "not",
        "what",
        "all",
        "were",
    ),
    *("we", "when", "your", "can", "said", "there", "use", "an", "each", "which", "she", "do", "how", "their", "if"),
]
_PROBE_WORDS = 64


def percentiles(values: list[float], scale: float = 1e3) -> dict[str, float]:
    """p50, p90, p99 and mean of seconds, in milliseconds."""
    if not values:
        return {}
    ordered = sorted(values)
    at = {f"p{q}": ordered[min(len(ordered) - 1, int(len(ordered) * q / 100))] for q in (50, 90, 99)}
    return {name: round(value * scale, 2) for name, value in (at | {"mean": statistics.fmean(values)}).items()}


def summary(calls: list[TimedCall], elapsed: float) -> dict[str, Any]:
    """One row of the result: rates over the whole run, percentiles over requests and over gaps between chunks."""
    good = [call for call in calls if call.error is None]
    gaps = [b - a for call in good for a, b in zip(call.arrivals, call.arrivals[1:], strict=False)]
    tokens = sum(call.completion_tokens for call in good)
    return {
        "requests": len(calls),
        "failed": len(calls) - len(good),
        "first_error": next((call.error for call in calls if call.error), None),
        "elapsed_s": round(elapsed, 3),
        "prompt_tokens": sum(call.prompt_tokens for call in good),
        "output_tokens": tokens,
        "output_tokens_per_s": round(tokens / elapsed, 1),
        "requests_per_s": round(len(good) / elapsed, 2),
        "ttft_ms": percentiles([call.ttft for call in good if call.ttft is not None]),
        "inter_token_ms": percentiles(gaps),
        "e2e_ms": percentiles([call.total for call in good]),
    }


class CallsBar:
    """A line on stderr: rewritten in place on a terminal, elsewhere a new one every ten seconds."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done, self._failed = name, total, 0, 0
        self._live, self._told = sys.stderr.isatty(), time.monotonic()

    def tick(self, call: TimedCall) -> None:
        self._done += 1
        self._failed += call.error is not None
        is_last = self._done == self._total
        failed = f", {self._failed} failed" if self._failed else ""
        if self._live:
            filled = "#" * (30 * self._done // self._total)
            end = "\n" if is_last else ""
            text = f"\r{self._name:>16} [{filled:<30}] {self._done}/{self._total}{failed}"
            print(text, end=end, file=sys.stderr, flush=True)
        elif is_last or time.monotonic() - self._told > 10:
            self._told = time.monotonic()
            print(f"{self._name}: {self._done} of {self._total}{failed}", file=sys.stderr, flush=True)


@dataclass
class Traffic:
    """How long prompts and answers are, and what is sent: drawn from a seed, so that two servers get the same."""

    model: str
    lengths: Literal["sharegpt", "fixed"]
    prompt_tokens: int
    max_tokens: int
    temperature: float
    seed: int
    longest: int | None = None
    """tokens of prompt and answer together that the server takes"""
    ignores_end: bool = True
    """whether the server knows `ignore_eos`, by which an answer is as long as it was drawn"""
    words_per_token: float = 1.0
    template_tokens: int = 0
    """that the chat template puts around a prompt"""

    async def probe(self, endpoint: Endpoint) -> None:
        """Two requests: whether it serves, with `ignore_eos` and without, and how many tokens words are. LoadError
        where it does not."""
        rng = random.Random(self.seed)
        calls = []
        for words in (1, _PROBE_WORDS):
            call = await endpoint.complete(self._body(words, 2, rng))
            if call.error is not None and self.ignores_end:
                self.ignores_end = False
                call = await endpoint.complete(self._body(words, 2, rng))
            if call.error is not None:
                raise LoadError(f"{endpoint.url} does not serve {self.model}: {call.error}")
            calls.append(call)
        few, many = calls[0].prompt_tokens, calls[1].prompt_tokens
        if many > few:
            self.words_per_token = (_PROBE_WORDS - 1) / (many - few)
            self.template_tokens = max(0, few - round(1 / self.words_per_token))

    def bodies(self, count: int) -> list[dict[str, Any]]:
        """Of so many requests, the same each time it is called."""
        rng = random.Random(self.seed)
        return [self._body(*self._lengths(rng), rng) for _ in range(count)]

    def _lengths(self, rng: random.Random) -> tuple[int, int]:
        """(words of the prompt, tokens of the answer)."""
        prompt, answer = self.prompt_tokens, self.max_tokens
        if self.lengths == "sharegpt":
            prompt, answer = (
                max(SHORTEST, min(LONGEST, round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))))
                for mean, sigma in SHAREGPT
            )
        if self.longest is not None:
            prompt = min(prompt, max(1, 3 * self.longest // 4))
            answer = max(1, min(answer, self.longest - prompt - 8))
        return max(1, round((prompt - self.template_tokens) * self.words_per_token)), answer

    def _body(self, num_words: int, max_tokens: int, rng: random.Random) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": " ".join(rng.choices(_WORDS, k=num_words))}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": self.temperature,
            "max_tokens": max_tokens,
        }
        return body | {"ignore_eos": True} if self.ignores_end else body


async def closed_loop(
    endpoint: Endpoint, bodies: list[dict[str, Any]], users: int, progress: CallsBar
) -> tuple[list[TimedCall], float]:
    """Each user sends the next request when the last one has ended: (the calls, seconds)."""
    waiting = iter(bodies)
    calls: list[TimedCall] = []

    async def user() -> None:
        for body in waiting:
            calls.append(await endpoint.complete(body))
            progress.tick(calls[-1])

    started = time.perf_counter()
    await asyncio.gather(*[user() for _ in range(min(users, len(bodies)))])
    return calls, time.perf_counter() - started


async def open_loop(
    endpoint: Endpoint, bodies: list[dict[str, Any]], rate: float, seed: int, progress: CallsBar
) -> tuple[list[TimedCall], float]:
    """Requests arrive at a rate, as those of people who do not know each other, whatever the server does."""
    rng = random.Random(seed)

    async def one(body: dict[str, Any]) -> TimedCall:
        call = await endpoint.complete(body)
        progress.tick(call)
        return call

    started, tasks, due = time.perf_counter(), [], 0.0
    for body in bodies:
        due += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(body)))
    return list(await asyncio.gather(*tasks)), time.perf_counter() - started
