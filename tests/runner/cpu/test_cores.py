"""Threads for physical cores, and NUMA, from made-up folders of /sys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptq_api.runner.cpu.cores import allowed_cpus, nodes, num_cores, numa_note


def cpus(root: Path, siblings: dict[int, str]) -> Path:
    for cpu, text in siblings.items():
        folder = root / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{text}\n")
    return root


PAIRS_APART = {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"}
PAIRS_BESIDE = {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}


@pytest.mark.parametrize(
    ("siblings", "allowed", "expected"),
    [
        (PAIRS_APART, range(8), 4),
        (PAIRS_APART, [0, 1, 4], 2),
        (PAIRS_APART, [5], 1),
        (PAIRS_BESIDE, range(4), 2),
        (PAIRS_BESIDE, [1, 2], 2),
        ({0: "0", 1: "1"}, [0, 1], 2),
        ({}, [0, 1, 2], 3),
        ({0: "nonsense", 1: "1"}, [0, 1], 2),
    ],
)
def test_cores_are_counted_and_not_their_threads(
    siblings: dict[int, str], allowed: list[int], expected: int, tmp_path: Path
) -> None:
    assert num_cores(set(allowed), cpus(tmp_path, siblings), tmp_path / "none") == expected


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 4), ("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1), ("900000 100000", 4), ("", 4)],
)
def test_a_quota_of_a_container_counts(quota: str, expected: int, tmp_path: Path) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    assert num_cores(set(range(8)), cpus(tmp_path, PAIRS_APART), file) == expected


def test_numa_nodes_are_those_we_run_on(tmp_path: Path) -> None:
    for node, text in {0: "0-3,8-11", 1: "4-7,12-15", 2: "", 10: "16"}.items():
        folder = tmp_path / f"node{node}"
        folder.mkdir()
        (folder / "cpulist").write_text(f"{text}\n")
    (tmp_path / "online").write_text("0-2,10")
    assert nodes(set(range(17)), tmp_path) == [0, 1, 10]
    assert nodes({5, 12}, tmp_path) == [1] and nodes({99}, tmp_path) == []
    assert numa_note({5}, tmp_path) == numa_note({0}, tmp_path / "none") == ""
    note = numa_note({4, 5, 16}, tmp_path)
    assert note.startswith("threads on 2 NUMA nodes") and "numactl --cpunodebind=1 --membind=1" in note


def test_on_this_machine() -> None:
    allowed = allowed_cpus()
    assert 1 <= num_cores(allowed) <= len(allowed) <= (os.cpu_count() or 1)
