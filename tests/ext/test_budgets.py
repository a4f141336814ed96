"""What the compiler may make of each kernel, on every architecture: registers, spills, and instructions of the loops in
which the time goes. No GPU is needed, so these hold for cards that nobody here has.

A kernel that is not in the table fails; so does one that outgrows its line. Whoever makes it larger for a reason writes
the new number here, and in tools/roofline.py where it is the GEMV's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from tests.ext.sass import COMPILE_S, EXT, Compiled, Compiler, Usage, longest_by_products, needs_nvcc
from tools.occupancy import REGISTERS, blocks_per_sm
from tools.roofline import GEMV_INSTRUCTIONS

pytestmark = [pytest.mark.compiles, needs_nvcc, pytest.mark.timeout(2 * COMPILE_S)]


@dataclass(frozen=True)
class Loop:
    """That of the kernel in which so many tensor core products are."""

    products: int
    instructions: int
    weights: int = 0
    """that they multiply, of a GEMV; the other products sum up x"""

    @property
    def of_4096(self) -> float:
        """Instructions for 4,096 weights."""
        return self.instructions * 4096 / self.weights


@dataclass(frozen=True)
class Line:
    """`kernels`: what their mangled names have in common. Of several lines for a kernel, the first is its own."""

    kernels: str
    registers: int
    loop: Loop | None = None
    operation: str = "HMMA"
    spills: int = 0
    """bytes"""
    why: str = ""
    """something is spilled"""


GEMV_THREADS = 10 * 32
WGMMA_TILES = 9
ONE_WARP = "only warps that attend alone spill, a few words once in a step of 128 tokens"
HEADS_OF_128 = "up to 15 words, once in a step of 128 tokens"


def attention(
    alone: int, alone_e4m3: int, block: int, block_e4m3: int, of_64: int, spills: int = 0
) -> tuple[Line, ...]:
    """Instructions of the loop over steps, in which everything is that happens to one, however seldom: of warps that
    attend alone and of whole blocks, with heads of 128; the most with heads of 64."""
    return (
        Line(r"OneWarpELi128ELb[01]ELb0E", 255, Loop(32, alone), spills=28, why=ONE_WARP),
        Line(r"OneWarpELi128ELb[01]ELb1E", 255, Loop(32, alone_e4m3), spills=44, why=ONE_WARP),
        Line(r"WholeBlockELi128ELb[01]ELb0E", 255, Loop(32, block), spills=spills, why=HEADS_OF_128),
        Line(r"WholeBlockELi128ELb[01]ELb1E", 255, Loop(32, block_e4m3), spills=spills, why=HEADS_OF_128),
        Line(r"SharingBlockELi128E", 255, spills=36, why=HEADS_OF_128),
        Line(r"SharingBlockELi64E", 255),
        Line(r"(OneWarp|WholeBlock)ELi64E", 255, Loop(16, of_64)),
    )


GEMV_HOPPER = (
    Line(r"ILi1ELi1ELb0E", 96, Loop(16, 160, 4096)),  # registers with which two blocks share an SM
    Line(r"ILi1ELi", 96),
    Line(r"ILi2ELi1ELb0E", 200, Loop(32, 200)),
    Line(r"ILi2ELi", 200),
)


def gemv_portable(instructions: int) -> tuple[Line, ...]:
    """Of the loop over chunks of four strips, with what moves on to the next four, some 14 of them."""
    return (
        Line(r"ILi1ELi1ELb0ELb0E", 136, Loop(40, instructions, 8192)),
        Line(r"ILi1ELi1ELb0ELb1E", 136, Loop(40, 420)),
        Line(r"ILi1ELi", 168, Loop(40, 680)),
        Line(r"ILi2ELi", 24),  # nothing: more than 8 rows are the GEMM's
    )


WGMMA = (
    Line(r"ILb0ELb1E", 168, Loop(8, 240), "HGMMA"),  # one group for a chunk, or fewer
    Line(r"ILb0ELb0E", 168, Loop(8, 480), "HGMMA"),
)
TWO_SETS = "128 sums beside what is loaded ahead: a few words, once for a chunk"


def mma(narrow: int, of_32: int, of_64: int, taller: int, widest: int, spills: int = 48) -> tuple[Line, ...]:
    """Instructions of the loop over chunks of the tiles 128x16, 128x32, 128x64, 256x64 and 256x128 with one group for a
    chunk, with those that turn to the next tile, some 130 of them; `spills`: of the widest."""
    return (
        Line(r"E0ELi8ELi16E", 128, Loop(32, narrow)),
        Line(r"E0ELi8ELi32E", 255, Loop(64, of_32)),
        Line(r"E0ELi8ELi64E", 255, Loop(128, of_64)),
        Line(r"E0ELi16ELi64E", 255, Loop(128, taller)),
        Line(r"E0ELi16ELi128E", 255, Loop(256, widest), spills=spills, why=TWO_SETS),
        Line(r"E[12]ELi8ELi(16|32)E", 255, spills=8, why="two words, where a tile begins"),
        Line(r"E[12]ELi", 255, spills=200, why=TWO_SETS),
    )


def same_bits(narrow: int, of_32: int, of_64: int) -> tuple[Line, ...]:
    """The same of the tiles 128x16, 128x32 and both with 64 tokens; the sums of x are 8 products of the loop."""
    return (
        Line(r"Lb1ELi4ELi16E", 176, Loop(40, narrow)),
        Line(r"Lb1ELi4ELi32E", 255, Loop(72, of_32)),
        Line(r"Lb1ELi[48]ELi64E", 255, Loop(136, of_64), spills=80, why=TWO_SETS),
        Line(r"Lb0ELi4ELi(16|32)E", 255),
        Line(r"Lb0ELi[48]ELi64E", 255, spills=140, why=TWO_SETS),
    )


def head(narrow: int, of_16: int, of_32: int, of_64: int, of_128: int) -> tuple[Line, ...]:
    """Instructions of the loop over slots of 64 k, with those that turn to the next tile, some 80 of them."""
    return (
        Line(r"ELi8E", 64, Loop(4, narrow)),
        Line(r"ELi16E", 64, Loop(8, of_16)),
        Line(r"ELi32E", 80, Loop(16, of_32)),
        Line(r"ELi64E", 104, Loop(32, of_64)),
        Line(r"ELi128E", 160, Loop(64, of_128)),
    )


HEAD_WGMMA = (
    Line(r"ELi(8|16|32)ELi[12]E", 48, Loop(4, 55), "HGMMA"),
    Line(r"ELi(64|128|192)ELi[12]E", 128, Loop(4, 55), "HGMMA"),
    Line(r"ELi256ELi2E", 168, Loop(4, 58), "HGMMA"),
)


SAME_BITS_WGMMA = (
    Line(r"Lb1ELi(16|32)E", 80, Loop(8, 190), "HGMMA", spills=80, why="where a chain ends, and what feeds the ring"),
    Line(r"Lb1ELi64E", 168, Loop(8, 230), "HGMMA"),
    Line(r"Lb1ELi(96|128)E", 168, Loop(8, 300), "HGMMA"),
    Line(r"Lb0ELi(16|32)E", 80, Loop(8, 375), "HGMMA", spills=115, why="as above"),
    Line(r"Lb0ELi", 168, Loop(8, 820), "HGMMA", spills=70, why="what feeds the ring and sums up x has few registers"),
)


DEQUANT = (Line("gather", 64), Line("dequant", 80))
EXCHANGE = (Line("(exchange_(rows|words)|pull_rows)_kernel", 40),)
EXCHANGE_NORM = (Line("exchange_norm_kernel", 128, spills=32, why="512 threads leave 128 registers"),)
OPS = (Line("rope", 112), Line("rms_norm", 128), Line("embed", 24))
TABLE: dict[tuple[str, str], tuple[Line, ...]] = {
    ("gemv/gemv_fp16.cu", "80"): gemv_portable(350),
    ("gemv/gemv_fp16.cu", "89"): gemv_portable(350),
    ("gemv/gemv_fp16.cu", "120"): gemv_portable(338),
    ("gemv/gemv_fp16.cu", "90"): GEMV_HOPPER,
    ("gemv/gemv_bf16.cu", "80"): gemv_portable(350),
    ("gemv/gemv_bf16.cu", "120"): gemv_portable(338),
    ("gemm/wgmma_fp16.cu", "90a"): WGMMA,
    ("gemm/mma_fp16.cu", "80"): mma(450, 520, 660, 640, 830),
    ("gemm/mma_bf16.cu", "89"): mma(470, 530, 675, 655, 915),
    ("gemm/mma_fp16.cu", "120"): mma(455, 540, 735, 705, 1005, spills=80),
    ("gemm/same_bits_fp16.cu", "80"): same_bits(520, 605, 855),
    ("gemm/same_bits_bf16.cu", "90"): same_bits(565, 650, 955),
    ("gemm/same_bits_fp16.cu", "120"): same_bits(540, 650, 960),
    ("gemm/same_bits_wgmma_fp16.cu", "90a"): SAME_BITS_WGMMA,
    **{("gemm/dequant.cu", arch): DEQUANT for arch in ("80", "90", "120")},
    ("gemm/pack.cu", "80"): (Line("pack_kernel", 32),),
    ("attention/attention_decode_fp16.cu", "80"): attention(960, 1670, 2620, 3600, 2860),
    ("attention/attention_decode_bf16.cu", "89"): attention(960, 1090, 2610, 2830, 2380),
    ("attention/attention_decode_fp16.cu", "90"): attention(1010, 1090, 2680, 2790, 2360, 24),
    ("attention/attention_decode_fp16.cu", "120"): attention(860, 1205, 2390, 2710, 2170, 8),
    ("head/head_fp16.cu", "80"): head(160, 165, 170, 195, 255),
    ("head/head_bf16.cu", "89"): head(160, 165, 170, 195, 255),
    ("head/head_fp16.cu", "90"): head(160, 165, 170, 195, 255),
    ("head/head_fp16.cu", "120"): head(155, 165, 180, 225, 310),
    ("head/head_wgmma.cu", "90a"): HEAD_WGMMA,
    **{("exchange/exchange.cu", arch): EXCHANGE for arch in ("80", "90", "120")},
    **{("exchange/exchange_norm.cu", arch): EXCHANGE_NORM for arch in ("80", "90", "120")},
    ("ops/ops.cu", "80"): OPS,
    ("ops/ops.cu", "120"): OPS,
    **{("sampler/sampler.cu", arch): (Line("sample_kernel", 64),) for arch in ("80", "90", "120")},
    ("sampler/sampler_adjust.cu", "80"): (Line("adjust_kernel", 40),),
    ("sampler/sampler_logprobs.cu", "80"): (Line("logprobs_kernel", 64),),
}


def over(kernel: str, lines: tuple[Line, ...], usage: Usage, compiled: Compiled) -> str | None:
    """What of a kernel is more than its line allows; None where nothing is."""
    line = next((line for line in lines if re.search(line.kernels, kernel)), None)
    if line is None:
        return "it has no line in the table"
    if usage.registers > line.registers:
        return f"{usage.registers} registers, {line.registers} allowed"
    if usage.spills > line.spills:
        return f"{usage.spills} bytes spilled, {line.spills} allowed"
    if line.loop is not None:
        found = longest_by_products(compiled.code[kernel], line.operation)
        if line.loop.products not in found:
            return f"no loop has {line.loop.products} products; those that there are: {found}"
        if found[line.loop.products] > line.loop.instructions:
            return f"{found[line.loop.products]} instructions, {line.loop.instructions} allowed"
    return None


@pytest.mark.parametrize(("source", "arch"), TABLE, ids=lambda part: part.rpartition("/")[2])
def test_each_kernel_is_within_its_budget(source: str, arch: str, compiled: Compiler) -> None:
    done = compiled(source, arch)
    assert done.usage
    assert "wgmma.mma_async instructions are serialized" not in done.log
    too_much = {
        kernel: said for kernel, usage in done.usage.items() if (said := over(kernel, TABLE[source, arch], usage, done))
    }
    assert not too_much


def test_the_gemv_of_hopper_copies_in_bulk_and_has_no_fence(compiled: Compiler) -> None:
    """Two of its blocks share an SM with one token, and one of the decode attention stands beside one of its own."""
    gemv, attention_decode = compiled("gemv/gemv_fp16.cu", "90"), compiled("attention/attention_decode_fp16.cu", "90")
    assert len(gemv.usage) == 12
    for name, code in gemv.code.items():
        assert any(one.is_a("HMMA.16816.F32") for one in code), name
        assert any(one.is_a("UBLKCP") for one in code), name
        assert not any(one.is_a("MEMBAR.ALL.GPU") for one in code), f"{name}: a fence waits for every load in flight"
    narrow = max(usage.registers for name, usage in gemv.usage.items() if "ILi1E" in name)
    assert blocks_per_sm(90, GEMV_THREADS, narrow, 0) == 2
    # A quarter of an SM has a quarter of the registers, and three of the GEMV's ten warps.
    usual = max(usage.registers for name, usage in gemv.usage.items() if "ILi1ELi1E" in name)
    for name, usage in attention_decode.usage.items():
        of_both = [warps * -(-32 * registers // 256) * 256 for warps, registers in ((1, usage.registers), (3, usual))]
        assert sum(of_both) <= REGISTERS // 4, name


def test_the_kernels_of_a_layer_share_the_instruction_cache(compiled: Compiler) -> None:
    """An SM keeps 128 KiB of code. With 137 of GEMV, attention and norm each met the others gone, and a 13B's step was
    2 % slower than with 101."""
    kernels = {
        "gemv/gemv_fp16.cu": "gemv_kernelILi1ELi1ELb0E",
        "attention/attention_decode_fp16.cu": "WholeBlockELi128ELb0ELb0E",
        "ops/ops.cu": "rms_norm_kernelILb0ELb0ELi2E",
    }
    sizes = dict[str, int]()
    for source, kernel in kernels.items():
        (code,) = [code for name, code in compiled(source, "90").code.items() if kernel in name]
        sizes[kernel] = 16 * len(code)
    assert sum(sizes.values()) <= 108 << 10, sizes


def test_wgmma_is_not_serialised(compiled: Compiler) -> None:
    done = compiled("gemm/wgmma_fp16.cu", "90a")
    assert len(done.usage) == 2 * WGMMA_TILES
    assert "wgmma.mma_async instructions are serialized" not in done.log
    assert "C7508" not in done.log  # setmaxnreg ignored
    assert "wgmma.mma_async instructions are serialized" not in compiled("head/head_wgmma.cu", "90a").log


def test_what_is_spilled_has_a_reason() -> None:
    assert all(line.why for lines in TABLE.values() for line in lines if line.spills)


def test_every_source_of_kernels_is_in_the_table() -> None:
    """In one of its two types at least."""
    listed = {source.replace("_bf16", "_fp16") for source, _ in TABLE}
    there = {
        str(path.relative_to(EXT)).replace("_bf16", "_fp16")
        for path in EXT.rglob("*.cu")
        if re.search(r"__global__|_kernel\.cuh|_fp16\.cu|_bf16\.cu", path.name + path.read_text())
    }
    launchers = {
        "gemv/gemv.cu",
        "gemm/wgmma.cu",
        "gemm/mma.cu",
        "gemm/same_bits.cu",
        "head/head.cu",
        "gemm/same_bits_wgmma.cu",
        "attention/attention_decode.cu",
        "common/device.cu",
    }
    assert there - launchers == listed


def test_the_gemv_s_loops_are_those_that_the_roofline_counts_with() -> None:
    for (source, arch), lines in TABLE.items():
        for line in lines:
            if line.loop is not None and line.loop.weights:
                assert line.loop.of_4096 == GEMV_INSTRUCTIONS[int(arch)], (source, arch, line)
