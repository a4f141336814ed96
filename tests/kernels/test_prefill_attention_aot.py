"""Prefill attention compiled for GPUs that are not here: Triton needs none for that. Registers decide how many programs
share an SM, and a stack is traffic in the innermost loop. And the kernel interpreted, on the CPU."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptq_api.kernels.prefill_attention import HEAD_DIMS, TILE_ROWS, cache_type, constants, tiling

pytestmark = pytest.mark.slow
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float8_e4m3fn: "*fp8e4nv", torch.uint8: "*u8"}
HEADS = {64: (32, 4), 128: (40, 40)}
"""by the head dimensions that decode attention takes as well"""
CASES = ((torch.float16, False), (torch.bfloat16, True))
"""types of activations, and whether there is a window: neither changes much in the other"""
SM_REGISTERS, SM_SHARED = 65536, {80: 164, 86: 100, 89: 100, 90: 228, 120: 100}
"""KiB of shared memory, of which every program takes one more than it asks for"""


@pytest.fixture(autouse=True)
def needs_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        reason = "needs triton: pip install --constraint constraints.txt --editable '.[dev]'"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


def usage(
    code: int, head_dim: int, dtype: torch.dtype, stored: torch.dtype, window: bool, few: bool, folder: Path
) -> tuple[int, int, int]:
    """(registers and bytes of stack of a thread, bytes of shared memory of a program) in machine code for `code`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gptq_api.kernels.prefill_attention_kernel import prefill_attention_kernel as kernel

    how = tiling(code, head_dim, few)
    fixed = constants(how, code, *HEADS[head_dim], head_dim, 16, window)
    pointers = dict.fromkeys(("block_tables", "context_lens", "query_start", "tiles"), "*i32")
    pointers |= {"qkv": TYPES[dtype], "cache": TYPES[cache_type(stored, dtype, code)], "out": TYPES[dtype]}
    types = {"table_stride": "i32", "window": "i32", "scale": "fp32", **pointers, **dict.fromkeys(fixed, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in pointers}
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, fixed, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", code, 32), options=how.options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(done.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(cuobjdump), "-res-usage", str(cubin)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return int(found[1]), int(found[2]), int(done.metadata.shared)


@pytest.mark.compiles
@pytest.mark.parametrize("code", [80, 86, 89, 120])
def test_without_wgmma_nothing_is_on_a_stack_and_programs_share_an_sm(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for head_dim, is_e4m3, (dtype, window) in itertools.product(HEADS, (False, True), CASES):
        case = (code, head_dim, dtype, torch.float8_e4m3fn if is_e4m3 else dtype, window)
        registers, stack, shared = usage(*case, few=False, folder=tmp_path)
        programs = {64: 3, 128: 2}[head_dim]
        threads = 32 * tiling(code, head_dim, few=False).warps
        assert stack == 0, case
        assert programs * threads * -(-registers // 8) * 8 <= SM_REGISTERS, case
        assert programs * (shared + 1024) <= SM_SHARED[code] * 1024, case


@pytest.mark.compiles
def test_on_hopper_two_programs_share_an_sm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stack of a few words, which costs less than one program alone."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for few, window in itertools.product((False, True), (False, True)):
        registers, stack, shared = usage(90, 128, torch.float16, torch.float16, window, few, tmp_path)
        assert stack <= (0 if few else 112), (few, window)
        threads = 32 * tiling(90, 128, few).warps
        assert 2 * threads * -(-registers // 8) * 8 <= SM_REGISTERS, (few, window)
        assert 2 * (shared + 1024) <= SM_SHARED[90] * 1024, (few, window)


@pytest.mark.parametrize("code", [80, 86, 87, 89, 90, 100, 120])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tiles_of_keys_do_not_depend_on_tiles_of_queries(code: int, head_dim: int) -> None:
    """So that a row's sums are taken in one order, however many tiles a step has."""
    many, few = (tiling(code, head_dim, few) for few in (False, True))
    assert many.keys == few.keys
    assert {TILE_ROWS % many.rows, TILE_ROWS % few.rows} == {0}


INTERPRETED = """
import math, torch
from gptq_api.kernels import prefill_attention as module
module._device = lambda _: (80, 108)
from tests.kernels.test_prefill_attention_cuda import Step
Step(((1, 1), (5, 5), (70, 130)), 2, 1, 64, device="cpu").check()
Step(((40, 40), (33, 90)), 2, 1, 128, device="cpu").check(window=20)
Step(((40, 70),), 2, 2, 64, cache_dtype=torch.float8_e4m3fn, device="cpu").check()
step = Step(((16, 16),), 1, 1, 64, cache_dtype=torch.float8_e4m3fn, device="cpu")
numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0).view(4, 64)
step.values[0][:, 0] = numbers.repeat(4, 1)
step.qkv[:, :64] = 0  # every token weighs the same
slots = torch.arange(16)
step.kv_layer.view(torch.uint8)[step.block_tables[0, slots // 16].long(), 1, 0, slots % 16] = (
    numbers.to(torch.float8_e4m3fn).view(torch.uint8).repeat(4, 1)
)
exact = numbers.repeat(4, 1).double().cumsum(0) / torch.arange(1, 17)[:, None]
assert torch.allclose(step.run().double(), exact, rtol=2**-10, atol=2**-20)
print("as torch")
"""


def test_the_tiles_of_8_0_interpreted_on_the_cpu() -> None:
    """And every number of e4m3, as bit arithmetic reads it."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == "as torch\n", done.stderr[-2000:]
