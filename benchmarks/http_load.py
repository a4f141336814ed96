"""The client of benchmarks/serve.py: requests over plain HTTP/1.1 sockets in closed or open loop, and what was felt."""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Call:
    """One request as its sender saw it; times in seconds from the moment it was sent."""

    ttft: float | None = None
    arrivals: list[float] = field(default_factory=list)
    """when each chunk with text came"""
    total: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


class Server:
    """Where to send: splits the base URL once."""

    def __init__(self, url: str, api_key: str | None) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.prefix, self.api_key = parts.path.rstrip("/"), api_key

    async def request(self, method: str, path: str, body: dict[str, Any] | None) -> AsyncIterator[bytes]:
        """Send; yield the status line first, then the body as it arrives, de-chunked."""
        payload = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {self.host}:{self.port}", "Connection: close"]
        if body is not None:
            head += ["Content-Type: application/json", f"Content-Length: {len(payload)}"]
        if self.api_key:
            head.append(f"Authorization: Bearer {self.api_key}")
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=2**20)
        try:
            writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + payload)
            headers = await reader.readuntil(b"\r\n\r\n")
            yield headers.split(b"\r\n", 1)[0]
            if b"transfer-encoding: chunked" not in headers.lower():
                yield await reader.read()
                return
            while size := int(await reader.readline(), 16):
                yield (await reader.readexactly(size + 2))[:-2]
        finally:
            writer.close()

    async def json(self, method: str, path: str) -> Any:
        parts = [part async for part in self.request(method, path, None)]
        return json.loads(b"".join(parts[1:]))

    async def complete(self, body: dict[str, Any]) -> Call:
        call, started, buffer = Call(), time.perf_counter(), b""
        try:
            parts = self.request("POST", "/chat/completions" if "messages" in body else "/completions", body)
            status = await anext(parts)
            if b" 200" not in status:
                call.error = status.decode() + " " + b"".join([part async for part in parts]).decode()[:200]
                return call
            async for part in parts:
                buffer += part
                *events, buffer = buffer.split(b"\n\n")
                for event in events:
                    self._read(call, event, time.perf_counter() - started)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            call.error = f"{type(error).__name__}: {error}"
        call.total = time.perf_counter() - started
        if call.error is None and call.ttft is None:
            call.error = "no text came"
        return call

    @staticmethod
    def _read(call: Call, event: bytes, now: float) -> None:
        if not event.startswith(b"data: ") or event == b"data: [DONE]":
            return
        chunk = json.loads(event[6:])
        if "error" in chunk:
            call.error = chunk["error"]["message"]
        if usage := chunk.get("usage"):
            call.prompt_tokens, call.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        for choice in chunk.get("choices", []):
            text = choice.get("text") or choice.get("delta", {}).get("content")
            if text:
                call.ttft = now if call.ttft is None else call.ttft
                call.arrivals.append(now)


@dataclass
class Run:
    """All calls of a row, and when it began and ended on the clock that all processes share."""

    calls: list[Call]
    began: float
    ended: float


def percentiles(values: list[float], scale: float = 1e3) -> dict[str, float]:
    """p50, p90, p99 and mean of seconds, in milliseconds."""
    if not values:
        return {}
    ordered = sorted(values)
    at = {f"p{q}": ordered[min(len(ordered) - 1, int(len(ordered) * q / 100))] for q in (50, 90, 99)}
    return {name: round(value * scale, 2) for name, value in (at | {"mean": statistics.fmean(values)}).items()}


def summary(calls: list[Call], elapsed: float) -> dict[str, Any]:
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


class Load:
    """What every request asks for, drawn from a seed so that two runs send the same."""

    def __init__(self, args: argparse.Namespace, model: str, client: int = 0) -> None:
        self.args, self.model, self.rng = args, model, random.Random(args.seed + client)

    def body(self) -> dict[str, Any]:
        args = self.args
        common = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": args.temperature,
            "max_tokens": args.max_tokens,
            "ignore_eos": True,
        }
        if args.prompt_tokens:
            ids = [self.rng.randrange(10, args.vocab_size) for _ in range(args.prompt_tokens)]
            return common | {"prompt": ids}
        return common | {"messages": [{"role": "user", "content": f"{args.prompt} ({self.rng.randrange(10**6)})"}]}


async def closed_loop(server: Server, load: Load, users: int, requests: int, bar: Bar) -> Run:
    bodies = iter([load.body() for _ in range(requests)])
    calls: list[Call] = []

    async def user() -> None:
        for body in bodies:
            calls.append(await server.complete(body))
            bar.tick(calls[-1])

    started = time.perf_counter()
    await asyncio.gather(*[user() for _ in range(min(users, requests))])
    return Run(calls, started, time.perf_counter())


def client(number: int, args: argparse.Namespace, model: str, users: int, requests: int, begin: float) -> Run:
    """One of several processes; `begin`: when all of them do, on the clock they share."""
    load, server = Load(args, model, number), Server(args.url, args.api_key)
    time.sleep(max(0.0, begin - time.perf_counter()))
    return asyncio.run(closed_loop(server, load, users, requests, Bar("", requests, live=False)))


async def from_several(clients: int, args: argparse.Namespace, model: str, users: int, requests: int) -> Run:
    """The closed loop with its users dealt out to processes."""
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(clients, mp_context=multiprocessing.get_context("spawn")) as pool:
        await asyncio.gather(*[loop.run_in_executor(pool, time.sleep, 0.5) for _ in range(clients)])
        begin = time.perf_counter() + 0.2
        shares = [
            (users // clients + (i < users % clients), requests // clients + (i < requests % clients))
            for i in range(clients)
        ]
        runs = await asyncio.gather(
            *[loop.run_in_executor(pool, client, i, args, model, *share, begin) for i, share in enumerate(shares)]
        )
    calls = [call for run in runs for call in run.calls]
    return Run(calls, min(run.began for run in runs), max(run.ended for run in runs))


async def open_loop(server: Server, load: Load, rate: float, requests: int, bar: Bar) -> tuple[list[Call], float]:
    async def one(body: dict[str, Any]) -> Call:
        call = await server.complete(body)
        bar.tick(call)
        return call

    started, tasks, due = time.perf_counter(), [], 0.0
    for _ in range(requests):
        due += load.rng.expovariate(rate)
        await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(load.body())))
    return list(await asyncio.gather(*tasks)), time.perf_counter() - started


class Bar:
    """A progress line on stderr, rewritten in place on a terminal, silent elsewhere."""

    def __init__(self, name: str, total: int, live: bool | None = None) -> None:
        self.name, self.total, self.done, self.failed = name, total, 0, 0
        self.live = sys.stderr.isatty() if live is None else live

    def tick(self, call: Call) -> None:
        self.done += 1
        self.failed += call.error is not None
        if self.live:
            filled = "#" * (30 * self.done // self.total)
            end = "\n" if self.done == self.total else ""
            failed = f", {self.failed} failed" if self.failed else ""
            print(f"\r{self.name:>16} [{filled:<30}] {self.done}/{self.total}{failed}", end=end, file=sys.stderr)
