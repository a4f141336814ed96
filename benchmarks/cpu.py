"""The CPU engine over HTTP beside llama.cpp on the same threads, in one run and in turns: decode alone and in batches,
prefill, and the time from start to ready; random weights of one shape, GPTQ in groups of 128 beside Q4_0.

    python benchmarks/llama_cpp.py /tmp/llama.cpp                               # once, some ten minutes
    taskset -c 0,1 python benchmarks/cpu.py --llama-cpp /tmp/llama.cpp --out benchmarks/results
    taskset -c 0,1 python benchmarks/cpu.py --llama-cpp /tmp/llama.cpp --shapes llama-7b --out benchmarks/results
    python benchmarks/cpu.py --page            # README.md and docs/measurements.md, from the files in results

Threads are those that the process may use. Ours is `gptq-api serve` as a child process, asked for token ids over HTTP
by this process on the same threads: sampling, text and the client are in its figures. llama.cpp is measured by its own
`llama-batched-bench`, in which there is no sampling and no HTTP. Both see prompts of the same length and decode as many
tokens. Without --llama-cpp only ours is measured; of several folders the first one is in every turn, and others are in
every second one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import llama_cpp
import processor
from cpu_page import SENTENCE, TABLES, sentence, table, tables
from cpu_server import Case, Ours
from serve import machine

from gptq_api.bench.synthetic import SHAPES, write_folder
from gptq_api.runner.cpu.packed_cache import LEAST_BYTES, SETTLED_S


@dataclass(frozen=True)
class Plan:
    """What is measured of a shape."""

    cases: tuple[Case, ...]
    is_large: bool
    """Then all turns have one server, since starting takes long, and a prompt is not tried twice."""


PREFILL = Case("prefill", 1, 512, 1)
SMALL = Plan(
    (Case("decode", 1, 32, 96), Case("decode", 8, 16, 48), Case("decode", 16, 16, 32), PREFILL), is_large=False
)
LARGE = Plan((Case("decode", 1, 32, 32), PREFILL), is_large=True)
LARGE_SHAPE = 2 * 10**9
"""parameters from which on a shape has the short plan"""


def inspected(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "gptq_api", "inspect", str(folder), "--device", "cpu", "--json"]
    facts: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return facts


class Turns:
    """Ours and llama.cpp in turns; `seconds` and `rates` have what each measured. A context that ends the server."""

    def __init__(self, shape: str, work: Path, builds: list[Path]) -> None:
        """Writes the models."""
        self.shape, self.work, self.builds = SHAPES[shape], work, builds
        self.plan = LARGE if _parameters(self.shape) > LARGE_SHAPE else SMALL
        self.folder, self.cache, self.gguf = work / shape, work / "cache", work / "model.gguf"
        self.ids, self.threads = random.Random(0), len(processor.threads())
        write_folder(shape, self.folder)
        self.keeps = sum(file.stat().st_size for file in self.folder.iterdir()) > LEAST_BYTES
        settled = time.perf_counter() + (SETTLED_S + 0.5 if self.keeps else 0)
        self.files = set(self.folder.rglob("*"))
        self.llama_cpp_bytes = llama_cpp.write_model(builds[0], self.shape, self.gguf) if builds else 0
        self.facts = inspected(self.folder)
        time.sleep(max(0.0, settled - time.perf_counter()))
        self.bandwidth: dict[str, list[float]] = {"huge_pages": [], "small_pages": []}
        self.seconds: dict[str, list[float]] = {"first": [], "second": []}
        self.rates: dict[tuple[Case, str], list[float]] = {}
        self.turns = 0
        self._server = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()

    def turn(self) -> None:
        for pages, value in processor.read_bandwidth().items():
            self.bandwidth[pages].append(value)
        if self.turns == 0 or not self.plan.is_large:
            self._server.close()
            self._forget()
            with self._started("first"):
                self._await_what_is_kept()
            self.ours = self._server.enter_context(self._started("second"))
            self.ours.answers(Case("decode", 1, 32, 4), self.ids, self.shape["vocab_size"])
        self.turns += 1
        for case in self.plan.cases:
            told = [f"turn {self.turns}, {case.what} {case.batch} x {case.prompt} + {case.new}:"]
            for build in [None, *self.builds[:1], *(self.builds[1:] if self.turns % 2 else [])]:
                rate, name = self._rate(case, build), "" if build is None else build.name
                self.rates.setdefault((case, name), []).append(rate)
                told.append(f"{name or 'ours'} {rate:.1f}")
            print(*told, "tok/s", file=sys.stderr, flush=True)

    def _rate(self, case: Case, build: Path | None) -> float:
        """`build`: of llama.cpp; None: ours."""
        if build is None:
            return self.ours.rate(case, self.ids, self.shape["vocab_size"])
        if case.what == "prefill":
            return llama_cpp.prefill(build, self.gguf, self.threads, case.prompt, 1 if self.plan.is_large else 2)
        return llama_cpp.decode(build, self.gguf, self.threads, case.batch, case.prompt, case.new)

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

    def rows(self) -> list[dict[str, Any]]:
        """Medians of the turns so far."""
        embedding = self.shape["vocab_size"] * self.shape["hidden_size"] * 2
        found: list[dict[str, Any]] = []
        for case in self.plan.cases:
            size = {"batch": case.batch, "prompt": case.prompt, "new_tokens": case.new}
            row: dict[str, Any] = {"what": case.what, **size}
            row |= self._figures(case, "", self.facts["weight_bytes"] - embedding)
            for i, build in enumerate(self.builds):
                theirs = self._figures(case, build.name, self.llama_cpp_bytes)
                theirs["ratio"] = round(row["tok_s"] / theirs["tok_s"], 3)
                prefix = f"llama_cpp_{_word(build.name)}_" if i else "llama_cpp_"
                row |= {prefix + name: value for name, value in theirs.items()}
            found.append(row)
        for which, seconds in self.seconds.items():
            each = [round(value, 2) for value in seconds]
            found.append({"what": "start to ready", "time": which, "seconds": statistics.median(each), "each": each})
        return found

    def _figures(self, case: Case, build: str, token_bytes: int) -> dict[str, Any]:
        """`token_bytes`: what a decoded token reads."""
        each = self.rates[case, build]
        rate = statistics.median(each)
        figures = {"tok_s": round(rate, 2), "each": [round(value, 2) for value in each]}
        if case.what == "decode":
            share = rate / case.batch * token_bytes / (statistics.median(self.bandwidth["huge_pages"]) * 1e9)
            figures |= {"bytes_a_step": token_bytes, "share_of_bandwidth": round(share, 3)}
        return figures


def _parameters(shape: dict[str, Any]) -> int:
    """About so many."""
    return int(12 * shape["hidden_size"] ** 2 * shape["num_hidden_layers"])


def measure(shape: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is known after each turn. None begins that would not end within the time there is."""
    load = [round(value, 2) for value in os.getloadavg()]
    if load[0] > 0.5:
        print(f"others are busy here (load average {load[0]}): figures of little worth", file=sys.stderr)
    started = time.perf_counter()
    about = machine(args.commit)
    versions: dict[str, Any] = {"python": about["python"]}
    versions |= {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    if args.llama_cpp:
        versions["llama_cpp"] = {build.name: json.loads((build / "build.json").read_text()) for build in args.llama_cpp}
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as work, Turns(shape, Path(work), args.llama_cpp) as turns:
        longest = 0.0
        for _ in range(args.repeats):
            began = time.perf_counter()
            if turns.turns and began + longest - started > 60 * args.minutes:
                print(f"no time for more than {turns.turns} turns in {args.minutes:g} minutes", file=sys.stderr)
                return
            turns.turn()
            longest = max(longest, time.perf_counter() - began)
            yield {
                "machine": processor.facts() | {"load_before": load},
                "versions": versions,
                "commit": about["commit"],
                "date": about["date"],
                "seconds": round(time.perf_counter() - started),
                "turns": turns.turns,
                "dtype": turns.facts["dtype"],
                "kernels": turns.facts["paths"],
                "read_gb_s": {pages: statistics.median(values) for pages, values in turns.bandwidth.items()},
                "read_gb_s_each": turns.bandwidth,
                "rows": turns.rows(),
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
    parser.add_argument("--minutes", type=float, default=60, help="of a shape: fewer turns where they take longer")
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
        result: dict[str, Any] = {}
        for result in measure(shape, args):
            if args.out:  # after each turn, for whoever stops it
                args.out.mkdir(parents=True, exist_ok=True)
                file = args.out / file_of(result["machine"]["cpu"])
                before = json.loads(file.read_text()) if file.exists() else {}
                file.write_text(json.dumps(before | {shape: result}, indent=1) + "\n")
        print(table(shape, result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
