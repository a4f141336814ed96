"""The CUDA kernels under compute-sanitizer: every kind of launch, small (launches.py), and steps of the demo model.

    python benchmarks/sanitize.py --out benchmarks/results              # everything, within four minutes
    python benchmarks/sanitize.py --what attention,sampler --tools racecheck

memcheck, racecheck, synccheck and initcheck see the kernels of this package and no others: those of torch, of cuBLAS
and the prefill attention, which is in Triton, are not instrumented. Each tool looks at each part in a process of its
own, several at a time. Every tensor there is an allocation of its own (torch's cache of memory would hide what is read
or written beyond one's end), except in `graphs`. The demo's steps are memcheck's alone. Writes
`sanitizer-<gpu>-sm<build>.json`: what each tool found, on what; the build is what the kernels were compiled for, 80 in
the rehearsal of `make gpu-portable` (GPTQ_CUDA_MODULE names that build here as well).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("attention", "products", "planes", "demo", "graphs", "sampler", "between", "head", "layouts")
"""of launches.py, the longest first"""
TOOLS = ("racecheck", "memcheck", "initcheck", "synccheck")
FOR_MEMCHECK = ("demo", "graphs")
SECONDS = 230
"""what is not done by then is reported as not finished"""
FIRST_PORT = 49152
OWN = "kernel_substring=gptq"
OPTIONS = {
    "memcheck": ("--padding=4096",),
    "racecheck": (),
    "synccheck": (),
    # torch.zeros and torch.full, which make workspaces, are a kernel of torch's; copies of what kernels wrote that are
    # not followed would be called uninitialized.
    "initcheck": ("--kernel-name", "kernel_substring=FillFunctor", "--check-api-memory-access=no"),
}


@dataclass(frozen=True)
class Check:
    tool: str
    part: str
    port: int

    def command(self) -> list[str]:
        return [
            *("compute-sanitizer", f"--tool={self.tool}", "--kernel-name", OWN, *OPTIONS[self.tool]),
            *("--destroy-on-device-error=kernel", "--report-api-errors=no", "--print-limit=20"),
            *(f"--port={self.port}", "--launch-timeout=120", *work(self.part)),
        ]


def work(part: str) -> list[str]:
    return [sys.executable, __file__, "--work", part]


def checks(parts: list[str], tools: list[str]) -> list[Check]:
    """The longest first."""
    pairs = [(tool, part) for part in parts for tool in tools if tool == "memcheck" or part not in FOR_MEMCHECK]
    # compute-sanitizer tries ten ports from the one that it is given
    return [Check(tool, part, FIRST_PORT + 16 * i) for i, (tool, part) in enumerate(pairs)]


def run(command: list[str], part: str, seconds: float) -> tuple[int | None, str]:
    """(exit status, None: it took too long and was ended with all its children; what it said)."""
    environment = dict(os.environ)
    if part != "graphs":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        log, _ = child.communicate(timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        return None, child.communicate()[0]
    return child.returncode, log


def read_log(log: str) -> tuple[int | None, list[str], list[str]]:
    """(how much was found, None: the tool came to no end; its summaries; what was found, a line each and where)."""
    lines = [line[9:].strip("\n") for line in log.splitlines() if line.startswith("=" * 9)]
    summaries = [line.strip() for line in lines if "SUMMARY:" in line and "not printed" not in line]
    counts = [int(count) for line in summaries for count in re.findall(r"SUMMARY: (\d+)", line)]
    ignored = ("COMPUTE-SANITIZER", "Target application returned")
    found = []
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        text = line.strip()
        # an entry's first line is indented by one blank, its details by more
        if text and not line.startswith("  ") and "SUMMARY:" not in text and not text.startswith(ignored):
            found.append(f"{text} {after.strip()}" if after.startswith("  ") else text)
    return sum(counts) if counts else None, summaries, found


def check(one: Check, end: float) -> dict[str, Any]:
    began = time.monotonic()
    status, log = run(one.command(), one.part, end - began)
    count, summaries, found = read_log(log)
    result = {
        "finished": status == 0 and count is not None,
        "found": count,
        "summary": summaries,
        "first_errors": found[:10] if count else [],
        "seconds": round(time.monotonic() - began, 1),
    }
    if not result["finished"]:
        result["log"] = log.splitlines()[-20:]
    print(f"{one.tool:10} {one.part:10} {json.dumps(result)}", flush=True)
    return result


def some_of(known: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        asked = text.split(",")
        if unknown := [name for name in asked if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return [name for name in known if name in asked]

    return parse


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the .json")
    parser.add_argument("--commit", help="what was checked, where there is no git")
    parser.add_argument("--what", type=some_of(PARTS), default=list(PARTS), help=f"parts of {','.join(PARTS)}")
    parser.add_argument("--tools", type=some_of(TOOLS), default=list(TOOLS), help=f"some of {','.join(TOOLS)}")
    parser.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)), help="at a time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--work", choices=PARTS, help="only launch this part: what the tools run")
    return parser


def launched(part: str, seconds: float) -> list[str]:
    """What a part launches, without tools. What the driver or Triton compile at first use is kept for the tools."""
    status, log = run(work(part), part, seconds)
    if status != 0:
        print(f"{part} without tools: {'not done in time' if status is None else f'exit status {status}'}\n{log}")
        return []
    done: list[str] = json.loads([line for line in log.splitlines() if line.startswith("[")][-1])
    return done


def main() -> None:
    options = arguments().parse_args()
    began = time.monotonic()
    import torch
    from gpu_timing import machine

    from gptq_api.kernels import gemm
    from gptq_api.kernels.extension import compiled_for

    if (reason := gemm.unavailable_reason()) is not None:
        sys.exit(f"nothing to check: {reason}")
    if options.work:
        from launches import launch

        print(json.dumps(launch(options.work)))
        return
    if shutil.which("compute-sanitizer") is None:
        sys.exit("no compute-sanitizer on PATH; it comes with the CUDA toolkit")
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"Version (\S+)", version)
    result = machine(options.commit) | {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    result["compiled_for"] = build = compiled_for(torch.cuda.current_device())
    result["versions"]["compute-sanitizer"] = found[1] if found else version.strip()
    todo, end = checks(options.what, options.tools), began + options.seconds
    with ThreadPoolExecutor(options.jobs) as pool:
        plain = list(pool.map(lambda part: launched(part, end - time.monotonic()), options.what))
        print(f"everything once without tools: {time.monotonic() - began:.1f} s", flush=True)
        done = list(pool.map(lambda one: check(one, end), todo))
    result["launches"] = dict(zip(options.what, plain, strict=True))
    result["tools"] = {tool: {} for tool in options.tools}
    for one, outcome in zip(todo, done, strict=True):
        result["tools"][one.tool][one.part] = outcome
    result["seconds"] = round(time.monotonic() - began, 1)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        name = f"sanitizer-{torch.cuda.get_device_name().lower().replace(' ', '-')}-sm{build}.json"
        (options.out / name).write_text(json.dumps(result, indent=1) + "\n")
    bad = [part for part, what in result["launches"].items() if not what]
    bad += [f"{one.tool} {one.part}" for one, r in zip(todo, done, strict=True) if not r["finished"] or r["found"]]
    if bad:
        sys.exit(f"not clean: {', '.join(bad)}")
    print(f"clean: {len(todo)} checks in {result['seconds']} s")


if __name__ == "__main__":
    main()
