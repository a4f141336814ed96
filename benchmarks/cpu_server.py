"""benchmarks/cpu.py's server, and what a client gets from it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import processor
from http_load import Call, Server


@dataclass(frozen=True)
class Case:
    """A row: so many requests at once, each with a prompt of `prompt` tokens and an answer of `new`."""

    what: str
    batch: int
    prompt: int
    new: int


class Ours:
    """`gptq-api serve` on a folder; a context that ends it."""

    def __init__(self, folder: Path, cache: Path, log: Path) -> None:
        """Returns when it is ready: `seconds` after it was started. `cache`: where it may keep files between starts."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = ["--device", "cpu", "--num-threads", len(processor.threads()), "--max-model-len", 1024]
        options += ["--speculate", "off"]  # random weights repeat themselves, which says nothing of others
        command = [sys.executable, "-m", "gptq_api", "serve", folder, "--port", port, "--kv-cache-mib", 1024, *options]
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
        started = time.perf_counter()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [str(word) for word in command], stdout=file, stderr=subprocess.STDOUT, env=environment
            )
        self.base = f"http://127.0.0.1:{port}"
        while not self._ready():
            if self.process.poll() is not None or time.perf_counter() - started > 600:
                self.process.kill()
                raise SystemExit(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.01)
        self.seconds = time.perf_counter() - started
        with urllib.request.urlopen(f"{self.base}/v1/models") as answer:
            self.model = json.load(answer)["data"][0]["id"]

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.base}/ready", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()

    def answers(self, case: Case, ids: random.Random, vocab_size: int) -> list[Call]:
        """All requests of a case at once; each prompt is a new one, so that none is in the prefix cache."""
        server = Server(f"{self.base}/v1", None)
        bodies = [
            {
                "model": self.model,
                "prompt": [ids.randrange(10, vocab_size) for _ in range(case.prompt)],
                "max_tokens": case.new,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            for _ in range(case.batch)
        ]

        async def together() -> list[Call]:
            return list(await asyncio.gather(*[server.complete(body) for body in bodies]))

        calls = asyncio.run(together())
        for call in calls:
            if call.error is not None:
                raise SystemExit(f"the server does not serve: {call.error}")
        return calls

    def rate(self, case: Case, ids: random.Random, vocab_size: int) -> float:
        """Tokens per second: of the prompt up to its first token, or of the answers while all of them grow."""
        calls = self.answers(case, ids, vocab_size)
        return case.prompt / (calls[0].ttft or 0) if case.what == "prefill" else common_rate(calls)


def common_rate(calls: list[Call]) -> float:
    """Tokens per second between the last first token and the first last one. A token without a text of its own comes
    with the next one's, so chunks are counted and their share of the tokens is made up for."""
    begin, end = max(call.arrivals[0] for call in calls), min(call.arrivals[-1] for call in calls)
    if begin >= end:  # one was through before another began: the time in which any of them grew
        begin, end = min(call.arrivals[0] for call in calls), max(call.arrivals[-1] for call in calls)
    chunks = sum(begin < at <= end for call in calls for at in call.arrivals)
    tokens_a_chunk = sum(call.completion_tokens for call in calls) / sum(len(call.arrivals) for call in calls)
    return chunks * tokens_a_chunk / max(end - begin, 1e-6)
