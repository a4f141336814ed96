"""Several servers behind smg (Shepherd Model Gateway), run as docs/operations.md says, and what is asked of them."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from tests.support.server import Server, chat_body, wait_for

FLAGS = (
    *("--policy", "cache_aware", "--disable-tokenizer-autoload", "--log-level", "warn"),
    *("--health-check-endpoint", "/ready", "--health-check-interval-secs", "1"),
    *("--health-failure-threshold", "1", "--health-success-threshold", "1", "--worker-startup-check-interval", "1"),
)
DRAIN_DELAY_S = 3.0
"""of the servers: more than a round of smg's questions takes"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Fleet:
    """`num` servers of one model behind one gateway. A server that is started again has the port of the one before."""

    def __init__(self, smg: str, num: int = 2, *flags: str) -> None:
        """`smg`: its program."""
        self._flags = ("--drain-delay-s", f"{DRAIN_DELAY_S:g}", *flags)
        self.servers = [Server(*self._flags, port=free_port(), wait=False) for _ in range(num)]
        self._log = tempfile.NamedTemporaryFile(suffix=".log")  # noqa: SIM115  (closed by close)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            for server in self.servers:
                server.wait_ready()
            command = [smg, "launch", "--host", "127.0.0.1", "--port", str(self.port), *FLAGS]
            command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
            command += ["--worker-urls", *(f"http://127.0.0.1:{server.port}" for server in self.servers)]
            self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
            self.url = f"http://127.0.0.1:{self.port}"
            self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
            self.wait_healthy(num, 60)
        except BaseException:
            self.close()
            raise

    def num_healthy(self) -> int:
        """Servers that the gateway sends requests to; -1: it does not answer."""
        try:
            return int(self.http.get("/readiness").json().get("healthy_workers", 0))
        except httpx.TransportError:
            return -1

    def wait_healthy(self, num: int, seconds: float = 30) -> None:
        wait_for(lambda: self.num_healthy() == num, seconds)

    def stop(self, place: int) -> int:
        """SIGTERM; the exit status."""
        self.servers[place].signal(signal.SIGTERM)
        return self.servers[place].wait(60)

    def start(self, place: int) -> None:
        """Another server where one was; returns when the gateway sends it requests."""
        old = self.servers[place]
        old.close()
        self.servers[place] = Server(*self._flags, port=old.port)
        self.wait_healthy(len(self.servers))

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self.http.close()
        for server in self.servers:
            server.close()
        self._log.close()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            print(Path(self._log.name).read_text()[-4000:], *(server.log()[-2000:] for server in self.servers))
        self.close()


@dataclass
class Load:
    """What became of requests."""

    num: int = 0
    failed: list[str] = field(default_factory=list)
    by_prefix: dict[str, list[int]] = field(default_factory=dict)
    """cached tokens of each request, in the order of their answers"""


async def _ask(client: httpx.AsyncClient, load: Load, body: dict[str, Any], key: str) -> None:
    load.num += 1
    try:
        answer = await client.post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            load.failed.append(f"{answer.status_code}: {answer.text[:200]}")
            return
        told = answer.json()
        assert told["choices"][0]["finish_reason"] in ("stop", "length"), told
        load.by_prefix.setdefault(key, []).append(told["usage"]["prompt_tokens_details"]["cached_tokens"])
    except (httpx.HTTPError, ValueError, KeyError, AssertionError) as error:
        load.failed.append(repr(error))


def under_load(url: str, until: Callable[[int], bool], num_users: int = 4) -> Load:
    """Users that ask one short question after the other, until `until(number of requests)`."""
    load = Load()

    async def user(client: httpx.AsyncClient, number: int) -> None:
        while not until(load.num):
            content = f"User {number} asks for the {load.num}th time: what is GPTQ?"
            await _ask(client, load, chat_body(content, model="demo", max_tokens=4), str(number))

    async def run() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
            await asyncio.gather(*(user(client, number) for number in range(num_users)))

    asyncio.run(run())
    return load


def asked_with_prefixes(url: str, prefixes: Sequence[str], rounds: int) -> Load:
    """Each round asks one question behind each prefix, all at once."""
    load = Load()

    async def run() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
            for number in range(rounds):
                bodies = [
                    (chat_body(f"{prefix} Question {number}", model="demo", max_tokens=2), prefix)
                    for prefix in prefixes
                ]
                await asyncio.gather(*(_ask(client, load, body, prefix) for body, prefix in bodies))

    asyncio.run(run())
    return load


def prefixes(num: int) -> list[str]:
    """Beginnings of prompts that differ from the first word on, of some 200 tokens each."""
    return [
        f"{word}: " + f"{word} and everything that is known of it. " * 20
        for word in ("alpha", "beta", "gamma", "delta")
    ][:num]


def hit_share(load: Load, whole: int) -> float:
    """Requests that found at least `whole` tokens cached, of those that could: all but the first of each prefix."""
    later = [cached for found in load.by_prefix.values() for cached in found[1:]]
    return sum(cached >= whole for cached in later) / len(later)


def milliseconds(urls: Sequence[str], num: int) -> list[list[float]]:
    """By URL, of one short request after the other, `num` to each in turns."""
    found: list[list[float]] = [[] for _ in urls]
    with httpx.Client(timeout=60, trust_env=False) as client:
        for _ in range(num):
            for url, times in zip(urls, found, strict=True):
                began = time.perf_counter()
                client.post(f"{url}/v1/chat/completions", json=chat_body(model="demo", max_tokens=1)).raise_for_status()
                times.append((time.perf_counter() - began) * 1000)
    return found
