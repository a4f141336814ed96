"""Servers that several test files share (starting one takes seconds), and marks that follow from what a test does."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

from tests.support.commands import CLI, TORCH, Commands
from tests.support.server import Server

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each process
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; servers would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
CLOCKS = {"monotonic", "perf_counter", "process_time"}


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The demo model with default settings."""
    with Server("--speculate", "auto") as running:
        yield running


@pytest.fixture(scope="session")
def strict_server() -> Iterator[Server]:
    """Small limits, short timeouts, two keys, JSON log."""
    with Server(
        *("--api-key", "first-key,second-key", "--strict-params", "--log-json", "--served-model-name", "strict"),
        *("--max-body-bytes", "100000", "--max-queued-requests", "4", "--max-num-seqs", "2"),
        *("--header-timeout-s", "1", "--body-timeout-s", "1", "--send-timeout-s", "1", "--sse-ping-s", "0.2"),
    ) as running:
        running.http.headers["authorization"] = "Bearer first-key"
        yield running


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """Runs commands that a server or no torch is enough for."""
    with Commands(CLI) as running:
        yield running


@pytest.fixture(scope="session")
def torch_commands() -> Iterator[Commands]:
    """Runs commands that compute."""
    with Commands(TORCH) as running:
        yield running


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where our CPU kernels could not be built."""
    from gptq_api.runner.cpu import native

    monkeypatch.setattr(native, "_cpu", None)


@pytest.fixture
def slow_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that a test starts compute with plain C++, 20 times slower: the longest answer of the demo takes seconds,
    and not a third of one, so that it is still on its way when something happens to it."""
    monkeypatch.setenv("GPTQ_CPU_INSTRUCTION_SET", "portable")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m "alone ..."` imports the files that have such tests, and no others."""
    if not str(config.getoption("markexpr")).startswith("alone") or not collection_path.match("test_*.py"):
        return None
    return "mark.alone" not in collection_path.read_text(encoding="utf-8") or None


def names_in(code: CodeType) -> set[str]:
    """Globals and attributes that a function and the functions within it name."""
    return set(code.co_names).union(*(names_in(const) for const in code.co_consts if isinstance(const, CodeType)))


def marks_of(function: Any, seen: set[Any]) -> set[str]:
    """`server` and `timing` for a test or fixture, by its own names and those of the functions of its file it calls."""
    function = getattr(function, "__wrapped__", function)
    if not isinstance(function, FunctionType) or function in seen:
        return set()
    seen.add(function)
    names = names_in(function.__code__)
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    marks = {"server"} if any(starter in values for starter in (Server, Commands, subprocess)) else set()
    if time in values and names & CLOCKS:
        marks.add("timing")
    near = (value for value in values if getattr(value, "__module__", None) == function.__module__)
    return marks.union(*(marks_of(value, seen) for value in near))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function):
            fixtures = [found[-1].func for found in item._fixtureinfo.name2fixturedefs.values()]
            seen: set[Any] = set()
            for mark in set().union(*(marks_of(function, seen) for function in (item.function, *fixtures))):
                item.add_marker(mark)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was skipped, in one line; `-rs` lists all of it."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped and "s" not in terminalreporter.reportchars:
        why = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
        (first, count), others = why.most_common(1)[0], len(why) - 1
        more = f", and {others} other reason{'s' * (others > 1)}" if others else ""
        terminalreporter.write_line(f"{len(skipped)} skipped, {count} of them since {first}{more} (-rs lists them)")
