"""A short form of `make sanitize-cpu`: random shapes of the CPU's products, memory and arithmetic watched."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from gptq_api.runner.cpu import native
from tests.kernels.sanitize_cpu import MEMORY, build_fuzz, instruction_sets, run_fuzz

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(not native.is_available(), reason=native.MISSING),
]


def test_random_shapes_under_sanitizers(tmp_path: Path) -> None:
    sets = ["portable", "avx2"] if platform.machine() == "x86_64" else ["portable"]
    assert set(sets) <= instruction_sets().keys()
    program = build_fuzz(tmp_path, MEMORY, sets, "-O0")
    done = run_fuzz(program, "7", "10")
    assert done.returncode == 0 and "portable: 10 rounds" in done.stdout, done.stdout + done.stderr
    planted = run_fuzz(program, "plant")
    assert planted.returncode != 0 and "heap-buffer-overflow" in planted.stderr
