"""What a processor is and how fast it reads memory: the head of a result that was measured on a CPU."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve"),
)
"""those that kernels for quantized weights ask for, as /proc/cpuinfo spells them"""
_HUGE_PAGE = 2 * 2**20


def cpu_info(name: str) -> str:
    """The first value of that name in /proc/cpuinfo; empty where it is not there."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def threads() -> list[int]:
    """The numbers of the hardware threads that this process may use."""
    return sorted(os.sched_getaffinity(0))


def facts() -> dict[str, Any]:
    """Name, threads and the cores they belong to, instruction sets, and whether memory may come in huge pages."""
    flags = set((cpu_info("flags") or cpu_info("Features")).split())
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": cpu_info("model name") or os.uname().machine,
        "family_model": f"{cpu_info('cpu family')}/{cpu_info('model')}",
        "threads": len(threads()),
        "cores": len({_core(thread) for thread in threads()}),
        "threads_of_the_machine": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "huge_pages": mode.read_text().strip() if mode.exists() else "unknown",
    }


def _core(thread: int) -> str:
    """Hardware threads of one core have the same."""
    siblings = Path(f"/sys/devices/system/cpu/cpu{thread}/topology/thread_siblings_list")
    return siblings.read_text().strip() if siblings.exists() else str(thread)


def read_bandwidth(num_bytes: int = 2**29, rounds: int = 3) -> dict[str, float]:
    """GB/s (10**9 bytes) at which all threads of this process together read memory, in huge pages and in small ones:
    the best of `rounds` of the largest number, for which a thread reads one stream, and of the product of two halves,
    two streams. numpy does either as fast as memory comes."""
    return {
        "huge_pages": _read_bandwidth(num_bytes, rounds, mmap.MADV_HUGEPAGE),
        "small_pages": _read_bandwidth(num_bytes, rounds, mmap.MADV_NOHUGEPAGE),
    }


def _read_bandwidth(num_bytes: int, rounds: int, advice: int) -> float:
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(advice)
    whole = np.frombuffer(memory, np.uint8)
    begin = -whole.ctypes.data % _HUGE_PAGE
    data = whole[begin : begin + num_bytes].view(np.float32)
    data.fill(1)
    count = len(threads())
    parts = [data[i * len(data) // count : (i + 1) * len(data) // count] for i in range(count)]
    best = float("inf")
    with ThreadPoolExecutor(count) as pool:
        for work in (_largest, _product) * (1 + rounds):
            started = time.perf_counter()
            list(pool.map(work, parts))
            best = min(best, time.perf_counter() - started)
    return round(num_bytes / best / 1e9, 1)


def _largest(part: np.ndarray[Any, Any]) -> float:
    return float(part.view(np.int32).max())


def _product(part: np.ndarray[Any, Any]) -> float:
    middle = len(part) // 2
    return float(np.dot(part[:middle], part[middle : 2 * middle]))
