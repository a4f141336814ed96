"""A server under everything at once, for as long as one likes: answers that are known beforehand, clients that leave,
that do not read or send nonsense, constrained answers; and what it holds meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from tests.attack.bodies import Generator, faults
from tests.attack.client import Connection, Reply, Request
from tests.attack.clients import (
    CHAT,
    chat_request,
    check_free,
    hang_up,
    num_descriptors,
    resident_bytes,
    text_of_stream,
)
from tests.support.server import Server, chat_body

NUM_CLIENTS = 12
FLAGS = ("--dtype", "float32", "--max-num-seqs", "16", "--max-model-len", "256", "--kv-cache-mib", "8")
"""the cache is small, since its memory counts from its first use on: 64 MiB would look like a leak for half an hour"""
KNOWN = [
    chat_body(f"Tell me about {i}.", max_tokens=8 + i % 40, seed=i, temperature=i % 2, ignore_eos=i % 3 == 0)
    for i in range(16)
]
OBJECT = {
    "type": "json_schema",
    "json_schema": {
        "name": "x",
        "schema": {
            "type": "object",
            "properties": {"a": {"enum": [1, 2, 3]}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}


@dataclass(slots=True)
class Soak:
    """What happened so far. Times in seconds, sizes in MiB."""

    server: Server
    rng: random.Random
    generator: Generator
    expected: list[str] = field(default_factory=list)
    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    samples: list[tuple[float, float, float, int]] = field(default_factory=list)
    """(minutes, MiB of the API process, MiB of the engine, descriptors), every second"""
    health: list[tuple[float, float]] = field(default_factory=list)
    """(minutes, seconds it took)"""

    async def client(self, ends: float) -> None:
        rng, port = self.rng, self.server.port
        connection = Connection(port)
        while time.monotonic() < ends:
            kind = rng.choices(("known", "leaves", "nonsense", "does not read", "constrained"), (78, 10, 5, 2, 5))[0]
            self.kinds[kind] = self.kinds.get(kind, 0) + 1
            reply = Reply(Request(CHAT), 0, {}, b"")
            try:
                match kind:
                    case "known":
                        i = rng.randrange(len(KNOWN))
                        text = await text_of_stream(port, KNOWN[i])
                        if text != self.expected[i]:
                            self.wrong.append(f"{i}: {text!r}")
                    case "leaves":
                        await hang_up(port, rng)
                    case "nonsense":
                        self.wrong += faults([await connection.ask(self.generator.request())])
                    case "does not read":
                        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
                        writer.write(chat_request(chat_body("A story.", stream=True, ignore_eos=True, n=2)))
                        await asyncio.sleep(1)
                        del reader
                        writer.transport.abort()
                    case _:
                        body = json.dumps(chat_body("Say it.", response_format=OBJECT, max_tokens=32)).encode()
                        reply = await connection.ask(Request(CHAT, body))
                        choice = json.loads(reply.body)["choices"][0]
                        text = choice["message"]["content"]
                        if choice["finish_reason"] == "stop" and json.loads(text)["a"] not in (1, 2, 3):
                            self.wrong.append(text)
                self.answers += 1
            except (OSError, EOFError, ValueError, KeyError) as error:
                if kind not in ("leaves", "does not read"):
                    self.wrong.append(f"{kind}: {type(error).__name__}: {error} {reply.status} {reply.body[:300]!r}")
        connection.close()

    async def watch(self, began: float, ends: float) -> None:
        connection, api, engine = Connection(self.server.port), self.server.process.pid, self.server.engine_pid
        while time.monotonic() < ends:
            started = time.monotonic()
            reply = await connection.ask(Request("/health", method="GET"))
            now = time.monotonic()
            minutes = (now - began) / 60
            self.health.append((minutes, now - started))
            if reply.status != 200:
                self.wrong.append(f"/health is {reply.status} {reply.why}")
            mib = (resident_bytes(api) / 2**20, resident_bytes(engine) / 2**20)
            self.samples.append((minutes, *mib, num_descriptors(api)))
            await asyncio.sleep(1)
        connection.close()

    async def run(self, seconds: float) -> None:
        self.expected = [await text_of_stream(self.server.port, body) for body in KNOWN]
        began = time.monotonic()
        ends = began + seconds
        async with asyncio.TaskGroup() as group:
            group.create_task(self.watch(began, ends))
            for _ in range(NUM_CLIENTS):
                group.create_task(self.client(ends))

    def slope(self, column: int) -> float:
        """MiB per minute, of the last two thirds: the first one fills caches."""
        rest = self.samples[len(self.samples) // 3 :]
        minutes = [sample[0] for sample in rest]
        return statistics.linear_regression(minutes, [float(sample[column]) for sample in rest]).slope

    def p99_ms(self, part: int) -> float:
        """Of /health in a quarter of the time, 0 to 3."""
        size = len(self.health) // 4
        quarter = sorted(seconds for _, seconds in self.health[part * size : (part + 1) * size])
        return quarter[int(0.99 * len(quarter))] * 1e3

    def result(self) -> dict[str, Any]:
        return {
            "minutes": round(self.samples[-1][0], 1),
            "requests": self.answers,
            "kinds": self.kinds,
            "wrong": len(self.wrong),
            "api_mib_per_min": round(self.slope(1), 3),
            "engine_mib_per_min": round(self.slope(2), 3),
            "api_mib": [round(self.samples[0][1], 1), round(self.samples[-1][1], 1)],
            "engine_mib": [round(self.samples[0][2], 1), round(self.samples[-1][2], 1)],
            "most_descriptors": max(sample[3] for sample in self.samples),
            "health_p99_ms": [round(self.p99_ms(part), 1) for part in range(4)],
        }


def soak(seconds: float, seed: int) -> Soak:
    """Run it; at the end nothing is held, and the log has no traceback."""
    with Server(*FLAGS) as server:
        server.chat(max_tokens=2, response_format=OBJECT)
        held = num_descriptors(server.process.pid)
        rng = random.Random(seed)
        found = Soak(server, rng, Generator(server.http.get("/openapi.json").json(), rng))
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(found.run(seconds))
        check_free(server, 30)
        assert num_descriptors(server.process.pid) <= held + 1
        assert "Traceback" not in server.log()
        return found
