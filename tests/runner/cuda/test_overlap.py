"""Kernels give the same bits whether they begin beside the end of the one before or not, in graphs and one by one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptq_api.kernels import gemm

CHILD = """
import hashlib, sys
from gptq_api.runner.load import load_runner
from gptq_api.runner.options import LoadOptions
from tests.runner.cpu.test_equal_bits import COMPANY, NUM_BLOCKS, answers

device, how, *flags = sys.argv[1:]
options = {"device": device, "num_threads": 1, "max_num_seqs": COMPANY, "num_blocks": NUM_BLOCKS}
runner = load_runner(LoadOptions(**options, batch_invariant="invariant" in flags))
if how == "one by one":
    runner._graphs.run = lambda shape, capture=True: runner._forward_and_sample(shape)
for num in (1, 8, COMPANY):
    found, _ = answers(runner, range(num), budget=200)
    print(hashlib.sha256(repr(found).encode()).hexdigest())
"""


def bits(device: str, how: str, overlap: str, *flags: str) -> list[str]:
    """Of what one, 8 and 32 requests get."""
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "GPTQ_CUDA_OVERLAP": overlap}
    command = [sys.executable, "-c", CHILD, device, how, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.gpu
@pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available")
@pytest.mark.parametrize("flags", [(), ("invariant",)], ids=["default", "batch-invariant"])
def test_neither_overlap_nor_graphs_change_a_bit(flags: tuple[str, ...]) -> None:
    expected = bits("cuda", "in graphs", "1", *flags)
    assert len(set(expected)) == 3
    for how in ("in graphs", "one by one"):
        for overlap in ("0", "1"):
            assert bits("cuda", how, overlap, *flags) == expected, (how, overlap)


def test_the_requests_say_something() -> None:
    assert len(set(bits("cpu", "in graphs", "1"))) == 3
