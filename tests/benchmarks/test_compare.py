"""benchmarks/compare.py: every committed result is read, and a change is found where it was made."""

from __future__ import annotations

import copy
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = sorted(
    path
    for name in ("decode", "gemm", "serve", "host", "sampler")
    for path in BENCHMARKS.glob(f"results/{name}-*.json")
)


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module("compare")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_is_the_same_as_itself(compare: ModuleType, path: Path) -> None:
    content = compare.entry(str(path))
    lines = compare.compare(content, content)
    assert len(lines) > 10 and all(line[0] == 1 for line in lines)
    assert compare.alone(content, content) == (0, 0)
    assert not any(mark.startswith("#") for *_, case in lines for mark in case), "two cases look the same"


def test_a_change_comes_first_with_its_case(compare: ModuleType) -> None:
    old = json.loads((BENCHMARKS / "results" / "gemm-nvidia-h200.json").read_text())
    new = copy.deepcopy(old)
    new["records"][7]["us"] *= 2
    new["records"][9]["us"] *= 0.1
    del new["records"][11]
    lines = compare.compare(old, new)
    assert [(round(change, 6), metric) for change, _, _, metric, _ in lines[:3]] == [(0.1, "us"), (2, "us"), (1, "us")]
    slow = old["records"][7]
    assert {f"M={slow['M']}", f"K={slow['K']}", f"N={slow['N']}", slow["dtype"]} <= set(lines[1][4])
    assert compare.alone(old, new) == (1, 0)


def test_percentiles_and_zeros(compare: ModuleType) -> None:
    old = {"rows": [{"concurrency": 1, "failed": 0, "ttft_ms": {"p50": 4.0}}]}
    new = {"rows": [{"concurrency": 1, "failed": 2, "ttft_ms": {"p50": 3.0}}]}
    lines = compare.compare(old, new)
    assert [line[:4] for line in lines] == [(float("inf"), 0, 2, "failed"), (0.75, 4, 3, "ttft_ms.p50")]


def test_one_file_holds_several_commits(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(BENCHMARKS / "results" / "sampler-nvidia-h200.json")
    runs = [str(run["commit"]) for run in json.loads(Path(path).read_text())]
    monkeypatch.setattr(sys, "argv", ["compare.py", f"{path}@{runs[1]}", path, "--least", "5"])
    assert compare.main() == 0
    said = capsys.readouterr().out
    assert f"old: NVIDIA H200, {runs[1]}\nnew: NVIDIA H200, {runs[0]}\n" in said
    assert "temperature 0.7, top_p 0.9" in said and "only in old: 0 cases, only in new: 0" in said
    monkeypatch.setattr(sys, "argv", ["compare.py", f"{path}@beef", path])
    assert compare.main() == 1
    assert "has no entry of commit beef" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_it_without_a_traceback() -> None:
    """As `| head` does."""
    path = str(BENCHMARKS / "results" / "gemm-nvidia-h200.json")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        command = [sys.executable, str(BENCHMARKS / "compare.py"), path, path]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True)
    assert done.stderr == "" and done.returncode == -signal.SIGPIPE
