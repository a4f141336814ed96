"""Which processors this process has: what Linux tells under /sys, and on other systems a guess."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Set
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_NODES = Path("/sys/devices/system/node")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def allowed_cpus() -> frozenset[int]:
    """The logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def num_cores(allowed: Set[int], cpus: Path = _CPUS, quota: Path = _QUOTA) -> int:
    """Physical cores among the logical processors `allowed`, no more than a control group's quota is worth. Two threads
    of one core share its path to memory and its multipliers; threads beyond a quota use it up sooner, and then all
    stand still."""
    cores = {_siblings(cpus, cpu) or frozenset([cpu]) for cpu in allowed}
    limits = [len(cores)]
    with contextlib.suppress(OSError, ValueError):  # "max 100000": no quota
        used, period = quota.read_text().split()
        limits.append(-(-int(used) // int(period)))
    return max(1, min(limits))


def nodes(allowed: Set[int], root: Path = _NODES) -> list[int]:
    """The NUMA nodes whose processors are among those `allowed`."""
    found = []
    for folder in root.glob("node[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if allowed & _listed((folder / "cpulist").read_text()):
                found.append(int(folder.name.removeprefix("node")))
    return sorted(found)


def numa_note(allowed: Set[int], root: Path = _NODES) -> str:
    """For the start line, with the remedy; empty where there is nothing to say."""
    found = nodes(allowed, root)
    if len(found) < 2:
        return ""
    return (
        f"threads on {len(found)} NUMA nodes, which read one another's memory slowly: numactl --cpunodebind={found[0]} "
        f"--membind={found[0]} keeps them on one"
    )


def _siblings(cpus: Path, cpu: int) -> frozenset[int]:
    """The logical processors of its core; empty where that is not told."""
    with contextlib.suppress(OSError, ValueError):
        return _listed((cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text())
    return frozenset()


def _listed(text: str) -> frozenset[int]:
    """ "0-2,8" -> 0, 1, 2, 8. ValueError for anything else."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
