"""What benchmarks/sanitize.py asks compute-sanitizer for, and what it reads in its answers."""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from types import ModuleType

import pytest

CLEAN = """========= COMPUTE-SANITIZER
["gemm M=1"]
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)
"""
FOUND = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void gptq::kernel<(bool)1>(gptq::Args)+0x70
=========     by thread (0,0,0) in block (0,0,0)
=========     Access to 0x7f at 0x7f00 is out of bounds
=========         Host Frame: launch [0x1000] in _cuda.so
=========
========= Barrier error detected. Divergent thread(s) in block.
=========     at gptq::other()+0x10
=========
========= Target application returned an error
========= ERROR SUMMARY: 120 errors
========= ERROR SUMMARY: 118 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    return importlib.import_module("sanitize"), importlib.import_module("launches")


def test_logs_are_read_to_the_end(scripts: tuple[ModuleType, ModuleType]) -> None:
    read_log = scripts[0].read_log
    assert read_log(CLEAN) == (0, ["RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"], [])
    count, summaries, found = read_log(FOUND)
    assert count == 120 and summaries == ["ERROR SUMMARY: 120 errors"]
    assert found == [
        "Invalid __global__ read of size 4 bytes at void gptq::kernel<(bool)1>(gptq::Args)+0x70",
        "Barrier error detected. Divergent thread(s) in block. at gptq::other()+0x10",
    ]
    died = "========= COMPUTE-SANITIZER\n========= Error: couldn't find exit code.\n"
    assert read_log(died) == (None, [], ["Error: couldn't find exit code."])


def test_every_tool_looks_at_every_part(scripts: tuple[ModuleType, ModuleType]) -> None:
    sanitize, launches = scripts
    assert set(sanitize.PARTS) == set(launches.PARTS)
    checks = sanitize.checks(list(sanitize.PARTS), list(sanitize.TOOLS))
    asked = {(one.tool, one.part) for one in checks}
    apart = [part for part in sanitize.PARTS if part not in sanitize.FOR_MEMCHECK]
    assert asked == {(tool, part) for tool in sanitize.TOOLS for part in apart} | {
        ("memcheck", part) for part in sanitize.FOR_MEMCHECK
    }
    assert len({one.port for one in checks}) == len(checks)
    assert sanitize.some_of(sanitize.PARTS)("sampler,attention") == ["attention", "sampler"]
    with pytest.raises(ArgumentTypeError, match="prefill: not among attention, "):
        sanitize.some_of(sanitize.PARTS)("prefill,demo")


def test_what_takes_too_long_is_ended(scripts: tuple[ModuleType, ModuleType]) -> None:
    status, log = scripts[0].run(["sh", "-c", "echo begun; sleep 60 & sleep 60"], "sampler", 0.5)
    assert status is None and log == "begun\n"
