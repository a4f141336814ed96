"""How the GPU benchmarks time: graphs that take turns, the clock, the ceilings of a run, and what machine it was."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from gptq_api.kernels.extension import compiled_for

REPLAYS = 5


def capture(calls: Callable[[], None]) -> torch.cuda.CUDAGraph:
    calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph


def clock() -> float:
    """MHz of the multiprocessors, by how long a kernel takes that waits for so many cycles."""
    cycles = 1_000_000
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return cycles / float(begin.elapsed_time(end)) / 1e3


class Clock:
    """Knows the highest clock seen, and waits for it."""

    def __init__(self) -> None:
        self.best = 0.0
        for _ in range(20):
            self.read()
            time.sleep(0.01)

    def read(self) -> float:
        now = clock()
        self.best = max(self.best, now)
        return now

    def settle(self, seconds: float = 1.0) -> None:
        deadline = time.monotonic() + seconds
        while self.read() < 0.98 * self.best and time.monotonic() < deadline:
            time.sleep(0.05)


def in_turns(jobs: list[tuple[Callable[[], None], int]]) -> list[float]:
    """Microseconds per call of each job, (what to capture, calls in it)."""
    graphs = [(capture(calls), count, list[float]()) for calls, count in jobs]
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(REPLAYS):
        for graph, count, times in graphs:
            time.sleep(0.003)
            graph.replay()
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / count)
    return [statistics.median(times) for _, _, times in graphs]


def ceilings() -> tuple[float, float]:
    """(TB/s of a large copy, read + written; fp16 TFLOP/s of 8192^3 through cuBLAS)."""
    a = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_(0, 256)
    b = torch.empty_like(a)
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    z = torch.empty_like(x)

    def product() -> None:
        torch.mm(x, y, out=z)

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(REPLAYS):  # no graph: as a node of one, a copy takes another, slower way
        begin.record()
        b.copy_(a)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    copy, multiply = statistics.median(times), in_turns([(product, 1)])[0]
    return 2 * a.numel() / copy / 1e6, 2 * 8192**3 / multiply / 1e6


def device_name() -> str:
    """What results are named by: with a rehearsal of older code, also for which architecture that was compiled."""
    name, index = torch.cuda.get_device_name(), torch.cuda.current_device()
    return f"{name} sm{compiled_for(index)}" if os.environ.get("GPTQ_CUDA_MODULE") else name


def machine(commit: str | None) -> dict[str, Any]:
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    smi = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout
    if commit is None:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = found.stdout.strip() or "unknown"
    values = [value.strip() for value in smi.splitlines()[0].split(",")] if smi else []
    return {
        "gpu": device_name(),
        "compiled_for": compiled_for(torch.cuda.current_device()),
        "machine": dict(zip(query.split(","), values, strict=False)),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda},
        "commit": commit,
    }
