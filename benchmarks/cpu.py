"""The CPU engine over HTTP beside llama.cpp on the same threads, in one run and in turns: decode alone and in batches,
prefill, and the time from start to ready; random weights of one shape, GPTQ in groups of 128 beside Q4_0.

    python benchmarks/llama_cpp.py /tmp/llama.cpp                               # once, some ten minutes
    taskset -c 0,1 python benchmarks/cpu.py --llama-cpp /tmp/llama.cpp --out benchmarks/results
    taskset -c 0,1 python benchmarks/cpu.py --llama-cpp /tmp/llama.cpp --shapes llama-7b --out benchmarks/results
    python benchmarks/cpu.py --page            # README.md and docs/measurements.md, from the files in results

Threads are those that the process may use. Ours is `gptq-api serve` as a child process, asked for token ids over HTTP
by this process on the same threads: sampling, text and the client are in its figures. llama.cpp is measured by its own
`llama-batched-bench`, in which there is no sampling and no HTTP. Both see prompts of the same length and decode as many
tokens. Without --llama-cpp only ours is measured; the first of several folders is the one that the ratios are of.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import llama_cpp
import processor
from cpu_page import SENTENCE, TABLES, sentence, table, tables
from http_load import Call, Server
from serve import machine

from gptq_api.bench.synthetic import SHAPES, write_folder
from gptq_api.runner.cpu.packed_cache import LEAST_BYTES, SETTLED_S


@dataclass(frozen=True)
class Case:
    """A row: so many requests at once, each with a prompt of `prompt` tokens and an answer of `new`."""

    what: str
    batch: int
    prompt: int
    new: int


@dataclass(frozen=True)
class Plan:
    """What is measured of a shape."""

    cases: tuple[Case, ...]
    is_large: bool
    """Then all turns have one server, since starting takes long, and a prompt is not tried twice."""


PREFILL = Case("prefill", 1, 512, 1)
SMALL = Plan(
    (Case("decode", 1, 32, 128), Case("decode", 8, 32, 64), Case("decode", 16, 32, 48), PREFILL), is_large=False
)
LARGE = Plan((Case("decode", 1, 32, 32), PREFILL), is_large=True)
LARGE_SHAPE = 2 * 10**9
"""parameters from which on a shape has the short plan"""


class Ours:
    """`gptq-api serve` on a folder; a context that ends it."""

    def __init__(self, folder: Path, cache: Path, log: Path) -> None:
        """Returns when it is ready: `seconds` after it was started. `cache`: where it may keep files between starts."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = ["--device", "cpu", "--num-threads", len(processor.threads()), "--max-model-len", 1024]
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


def inspected(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "gptq_api", "inspect", str(folder), "--device", "cpu", "--json"]
    facts: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return facts


class Turns:
    """Ours and llama.cpp in turns; `seconds` and `rates` have what each turn measured."""

    def __init__(self, shape: str, plan: Plan, work: Path, builds: list[Path]) -> None:
        self.shape, self.plan, self.work, self.builds = SHAPES[shape], plan, work, builds
        self.folder, self.cache, self.gguf = work / shape, work / "cache", work / "model.gguf"
        self.ids, self.threads = random.Random(0), len(processor.threads())
        write_folder(shape, self.folder)
        self.keeps = sum(file.stat().st_size for file in self.folder.iterdir()) > LEAST_BYTES
        settled = time.perf_counter() + (SETTLED_S + 0.5 if self.keeps else 0)
        self.files = set(self.folder.rglob("*"))
        self.bytes = llama_cpp.write_model(builds[0], self.shape, self.gguf) if builds else 0
        time.sleep(max(0.0, settled - time.perf_counter()))
        self.bandwidth: dict[str, list[float]] = {"huge_pages": [], "small_pages": []}
        self.seconds: dict[str, list[float]] = {"first": [], "second": []}
        self.rates: dict[tuple[Case, str], list[float]] = {}

    def run(self, repeats: int) -> None:
        server: Ours | None = None
        try:
            for turn in range(repeats):
                for pages, value in processor.read_bandwidth().items():
                    self.bandwidth[pages].append(value)
                if server is None or not self.plan.is_large:
                    if server is not None:
                        server.__exit__(None, None, None)
                        server = None
                    self._forget()
                    with self._started("first"):
                        self._await_what_is_kept()
                    server = self._started("second")
                    server.answers(Case("decode", 1, 32, 4), self.ids, self.shape["vocab_size"])
                for case in self.plan.cases:
                    self._measure(case, server, turn)
        finally:
            if server is not None:
                server.__exit__(None, None, None)

    def _started(self, which: str) -> Ours:
        server = Ours(self.folder, self.cache, self.work / "server.log")
        self.seconds[which].append(server.seconds)
        print(f"ready the {which} time after {server.seconds:.2f} s", file=sys.stderr)
        return server

    def _forget(self) -> None:
        """What an earlier start left for later ones."""
        shutil.rmtree(self.cache, ignore_errors=True)
        for path in sorted(set(self.folder.rglob("*")) - self.files, reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()

    def _await_what_is_kept(self) -> None:
        """A server keeps its packed weights when it is ready already: until that file is whole."""
        began = time.perf_counter()
        while self.keeps and time.perf_counter() - began < 120:
            names = [file.name for file in self.cache.rglob("*") if file.is_file()]
            if any(name.endswith(".packed") for name in names) and len(names) == 1:
                return
            time.sleep(0.05)

    def _measure(self, case: Case, server: Ours, turn: int) -> None:
        told = [f"turn {turn + 1}, {case.what} {case.batch} x {case.prompt} + {case.new}:"]
        for build in [None, *self.builds]:
            if build is None:
                rate = server.rate(case, self.ids, self.shape["vocab_size"])
            elif case.what == "prefill":
                rate = llama_cpp.prefill(build, self.gguf, self.threads, case.prompt, 1 if self.plan.is_large else 2)
            else:
                rate = llama_cpp.decode(build, self.gguf, self.threads, case.batch, case.prompt, case.new)
            self.rates.setdefault((case, "" if build is None else build.name), []).append(rate)
            told.append(f"{'ours' if build is None else build.name} {rate:.1f}")
        print(*told, "tok/s", file=sys.stderr, flush=True)

    def rows(self, token_bytes: int) -> list[dict[str, Any]]:
        """`token_bytes`: what a decoded token of ours reads."""
        bandwidth = statistics.median(self.bandwidth["huge_pages"]) * 1e9
        found: list[dict[str, Any]] = []
        for case in self.plan.cases:
            row: dict[str, Any] = {
                "what": case.what,
                "batch": case.batch,
                "prompt": case.prompt,
                "new_tokens": case.new,
            }
            ours = 0.0
            for build in ["", *(build.name for build in self.builds)]:
                first = bool(self.builds) and build == self.builds[0].name
                prefix = "" if not build else "llama_cpp_" if first else f"llama_cpp_{_word(build)}_"
                each = self.rates[case, build]
                rate = statistics.median(each)
                ours = ours or rate
                row |= {f"{prefix}tok_s": round(rate, 2), f"{prefix}each": [round(value, 2) for value in each]}
                if build:
                    row[f"{prefix}ratio"] = round(ours / rate, 3)
                if case.what == "decode":
                    read = self.bytes if build else token_bytes
                    share = rate / case.batch * read / bandwidth
                    row |= {f"{prefix}bytes_a_step": read, f"{prefix}share_of_bandwidth": round(share, 3)}
            found.append(row)
        for which, seconds in self.seconds.items():
            each = [round(value, 2) for value in seconds]
            found.append({"what": "start to ready", "time": which, "seconds": statistics.median(each), "each": each})
        return found


def measure(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    load = [round(value, 2) for value in os.getloadavg()]
    if load[0] > 0.5:
        print(f"others are busy here (load average {load[0]}): figures of little worth", file=sys.stderr)
    started = time.perf_counter()
    size = SHAPES[shape]["hidden_size"] ** 2 * SHAPES[shape]["num_hidden_layers"] * 12
    plan = LARGE if size > LARGE_SHAPE else SMALL
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        turns = Turns(shape, plan, Path(work), args.llama_cpp)
        facts = inspected(turns.folder)
        turns.run(args.repeats)
    embedding = SHAPES[shape]["vocab_size"] * SHAPES[shape]["hidden_size"] * 2
    about = machine(args.commit)
    builds = {build.name: json.loads((build / "build.json").read_text()) for build in args.llama_cpp}
    return {
        "machine": processor.facts() | {"load_before": load},
        "versions": {"python": about["python"]}
        | {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
        | ({"llama_cpp": builds} if builds else {}),
        "commit": about["commit"],
        "date": about["date"],
        "seconds": round(time.perf_counter() - started),
        "dtype": facts["dtype"],
        "kernels": facts["paths"],
        "read_gb_s": {pages: statistics.median(values) for pages, values in turns.bandwidth.items()},
        "read_gb_s_each": turns.bandwidth,
        "rows": turns.rows(facts["weight_bytes"] - embedding),
    }


def _word(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def file_of(cpu: str) -> str:
    """The result's name: "cpu-amd-epyc.json"."""
    return f"cpu-{_word(cpu).replace('_', '-')}.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=["tinyllama-1.1b"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--llama-cpp", type=Path, action="append", default=[], help="a folder that benchmarks/llama_cpp.py made"
    )
    parser.add_argument("--work", type=Path, help="where models are written: 1.3 GB of a 1.1B, 8 GB of a 7B")
    parser.add_argument("--commit", help="what was measured, where there is no git")
    parser.add_argument("--out", type=Path, help="folder for cpu-<processor>.json; shapes not measured now are kept")
    parser.add_argument("--page", action="store_true", help="write README.md's sentence and docs/measurements.md")
    args = parser.parse_args(arguments)
    if args.page:
        SENTENCE.write(sentence())
        TABLES.write(tables())
        return 0
    args.llama_cpp = [folder.resolve() for folder in args.llama_cpp]
    for shape in args.shapes:
        result = measure(shape, args)
        print(table(shape, result), flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            file = args.out / file_of(result["machine"]["cpu"])
            before = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps(before | {shape: result}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
