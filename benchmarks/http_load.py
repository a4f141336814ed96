"""The load of benchmarks/serve.py, by the client of `gptq-api bench serve`: users in several processes, random ids."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from gptq_api.bench.http_client import Endpoint as Server
from gptq_api.bench.http_client import TimedCall as Call
from gptq_api.bench.load import percentiles, summary

__all__ = [
    "Bar",
    "Call",
    "Load",
    "Run",
    "Server",
    "beside_a_long_prompt",
    "closed_loop",
    "from_several",
    "open_loop",
    "percentiles",
    "summary",
]


@dataclass
class Run:
    """All calls of a row, and when it began and ended on the clock that all processes share."""

    calls: list[Call]
    began: float
    ended: float


class Load:
    """What every request asks for, drawn from a seed so that two runs send the same."""

    def __init__(self, args: argparse.Namespace, model: str, client: int = 0) -> None:
        self.args, self.model, self.rng = args, model, random.Random(args.seed + client)

    def body(self, prompt_tokens: int | None = None) -> dict[str, Any]:
        """`prompt_tokens`: so many random ids, whatever the others have."""
        args = self.args
        prompt_tokens = args.prompt_tokens if prompt_tokens is None else prompt_tokens
        common = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": args.temperature,
            "max_tokens": args.max_tokens,
            "ignore_eos": True,
        }
        if prompt_tokens:
            ids = [self.rng.randrange(10, args.vocab_size) for _ in range(prompt_tokens)]
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


async def beside_a_long_prompt(
    server: Server, load: Load, answers: int, length: int
) -> tuple[list[Call], dict[str, float]]:
    """(the call with the prompt of `length` tokens, alone in a list; percentiles of the others' time between tokens
    from its sending to its first token, in milliseconds). SystemExit if one of the others did not write all that
    time."""

    async def one() -> tuple[float, Call]:
        began = time.perf_counter()
        return began, await server.complete(load.body())

    writing = [asyncio.create_task(one()) for _ in range(answers)]
    await asyncio.sleep(0.5)
    sent = time.perf_counter()
    call = await server.complete(load.body(length) | {"max_tokens": 1})
    first = sent + (call.ttft or call.total)
    gaps = []
    for began, other in await asyncio.gather(*writing):
        arrivals = [began + at for at in other.arrivals]
        if other.error or not arrivals or not arrivals[0] < sent < first < arrivals[-1]:
            why = other.error or "it ended before the prompt beside it had a token, or began later; more --max-tokens"
            raise SystemExit(f"an answer was not being written all the time: {why}")
        gaps += [b - a for a, b in itertools.pairwise(arrivals) if b > sent and a < first]
    return [call], percentiles(gaps)


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
