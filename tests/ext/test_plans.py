"""How the launchers lay their kernels out on each card, by running them without one (pretend_card.cpp): blocks that an
SM holds, by the registers that the compiler took and the shared memory that a launch asks for."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.ext.sass import COMPILE_S, EXT, NVCC, Compiler, needs_nvcc
from tools.cards import Card, find
from tools.occupancy import LIMITS, blocks_per_sm

pytestmark = [pytest.mark.compiles, needs_nvcc, pytest.mark.timeout(4 * COMPILE_S)]

KERNELS = {
    "gemv_kernel": "gemv/gemv_fp16.cu",
    "mma_kernel": "gemm/mma_fp16.cu",
    "head_kernel": "head/head_fp16.cu",
    "attention_decode_kernel": "attention/attention_decode_fp16.cu",
}
"""what stands in a kernel's name -> its source"""
SOURCES = (
    "common/device.cu",
    "gemv/gemv.cu",
    "gemm/mma.cu",
    "head/head.cu",
    "attention/attention_decode.cu",
    *KERNELS.values(),
)
GEMV = "gemv {} 15360 5120 1 0"
MMA = "mma {} 15360 5120 1 0"
"""qkv of a 13B, so many rows"""
HEAD = "head {} 32000 5120"
ATTENTION = "attention {} 40 40 128 0 {}"
"""of a 13B, so many sequences and tokens of context"""


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: int
    threads: int
    shared: int
    cluster: int
    overlapped: bool


Launcher = Callable[[Card, str], list[Launch]]
"""(card, a line that pretend_card.cpp reads) -> its launches"""


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    assert NVCC is not None
    folder = tmp_path_factory.mktemp("pretend_card")
    # Nobody runs the kernels, so PTX suffices, and a hasty one.
    flags = ["-std=c++17", f"-I{EXT}", "--expt-relaxed-constexpr", "-gencode=arch=compute_80,code=compute_80"]
    objects = []
    for source in SOURCES:
        objects.append(str(folder / f"{Path(source).stem}.o"))
        command = [NVCC, *flags, "-O0", "-Xcicc", "-O0", "-c", "-o", objects[-1], str(EXT / source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S)
        assert done.returncode == 0, done.stderr
    program, main = str(folder / "pretend_card"), str(Path(__file__).parent / "pretend_card.cpp")
    command = [NVCC, "-std=c++17", f"-I{EXT}", "-cudart", "none", "-o", program, main, *objects]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S)
    assert done.returncode == 0, done.stderr

    @cache
    def answer(card: Card, call: str) -> list[Launch]:
        most = LIMITS[card.capability].shared_of_a_block
        numbers = [str(number) for number in (card.sms, most, card.capability, card.code)]
        done = subprocess.run([program, *numbers], input=f"{call}\n", capture_output=True, text=True, timeout=10)
        assert done.returncode == 0, done.stderr
        rows = [line.split() for line in done.stdout.splitlines() if line]
        return [
            Launch(kernel, int(grid), int(threads), int(shared), int(cluster), overlapped == "1")
            for kernel, grid, threads, shared, cluster, overlapped in rows
        ]

    return answer


def plain(kernel: str) -> str:
    """Its mangled name without the numbers of a namespace without a name, which depend on where the source is."""
    return re.sub(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}", r"\1", kernel)


@pytest.fixture
def resident(launches: Launcher, compiled: Compiler) -> Callable[[str, str], tuple[int, int]]:
    """(card, call) -> (blocks of its one launch that an SM holds at once, blocks for each SM)."""

    def of(name: str, call: str) -> tuple[int, int]:
        card = find(name)
        (launch,) = launches(card, call)
        source = next(source for kernel, source in KERNELS.items() if kernel in launch.kernel)
        arch = "90" if card.code == 100 else str(card.code)
        usage = {plain(kernel): usage for kernel, usage in compiled(source, arch).usage.items()}[plain(launch.kernel)]
        fit = blocks_per_sm(card.capability, launch.threads, usage.registers, usage.shared + launch.shared)
        return fit, -(-launch.grid // card.sms)

    return of


@pytest.mark.parametrize(
    ("card", "call", "fit", "launched"),
    [
        ("A100 80 GB", GEMV.format(1), 1, 1),
        ("RTX 4090", GEMV.format(1), 1, 1),
        ("RTX 5090", GEMV.format(8), 1, 1),
        ("H200", GEMV.format(1), 1, 1),
        ("H200", GEMV.format(8), 1, 1),
        ("B200", GEMV.format(1), 1, 1),
        ("A100 80 GB", MMA.format(16), 2, 2),
        ("RTX 4090", MMA.format(16), 1, 1),
        ("A100 80 GB", MMA.format(256), 1, 1),
        ("RTX 4090", MMA.format(256), 1, 1),
        ("A100 80 GB", HEAD.format(1), 1, 1),
        ("RTX 4090", HEAD.format(64), 1, 1),
        ("RTX 4090", HEAD.format(256), 1, 1),
        ("B200", HEAD.format(256), 1, 1),
        # A block, and one of the GEMV before or after it.
        ("A100 80 GB", ATTENTION.format(1, 2048), 2, 1),
        ("RTX 4090", ATTENTION.format(1, 2048), 1, 1),
        ("H200", ATTENTION.format(1, 2048), 2, 1),
        # Two blocks where they fit.
        ("A100 80 GB", ATTENTION.format(64, 2048), 2, 2),
        ("RTX 3090", ATTENTION.format(64, 2048), 1, 1),
        ("RTX 4090", ATTENTION.format(64, 2048), 1, 1),
        ("RTX 5090", ATTENTION.format(64, 2048), 1, 1),
        ("H200", ATTENTION.format(64, 2048), 2, 2),
    ],
)
def test_blocks_of_an_sm(
    card: str, call: str, fit: int, launched: int, resident: Callable[[str, str], tuple[int, int]]
) -> None:
    assert resident(card, call) == (fit, launched)


def test_code_of_8_0_is_launched_on_an_h200_as_on_an_a100(launches: Launcher) -> None:
    for call in (
        GEMV.format(1),
        GEMV.format(16),
        MMA.format(16),
        MMA.format(256),
        HEAD.format(1),
        HEAD.format(256),
        ATTENTION.format(1, 2048),
        ATTENTION.format(64, 128),
    ):
        a100, h200 = (launches(find(card), call) for card in ("A100 80 GB", "H200 as 8.0"))
        shape = [(one.kernel, one.threads, one.shared, one.cluster, one.overlapped) for one in a100]
        assert shape == [(one.kernel, one.threads, one.shared, one.cluster, one.overlapped) for one in h200]


def test_launches_overlap_from_9_0_on_alone(launches: Launcher) -> None:
    for card, overlapped in (("A100 80 GB", False), ("RTX 4090", False), ("H200 as 8.0", False), ("H200", True)):
        (launch,) = launches(find(card), ATTENTION.format(1, 128))
        assert launch.overlapped is overlapped


@pytest.mark.parametrize("card", ["RTX 3090", "RTX 4090", "L40S", "A100 80 GB", "RTX 5090", "B200"])
def test_every_product_can_be_launched_on_every_card(card: str, launches: Launcher) -> None:
    """What a launch asks for is less than a block may have: the program fails otherwise."""
    for groups in (1, 2, 4):
        for zeros in (0, 1):
            for m in (9, 32, 33, 64, 300):
                (launch,) = launches(find(card), f"mma {m} 27648 5120 {groups} {zeros}")
                assert launch.shared > 0
            for m in (1, 8):
                (launch,) = launches(find(card), f"gemv {m} 5120 13824 {groups} {zeros}")
                assert launch.shared > 0


@pytest.mark.parametrize("card", ["RTX 3090", "RTX 4090", "A100 80 GB", "RTX 5090", "B200"])
def test_the_head_s_ring_fills_what_an_sm_has(card: str, launches: Launcher) -> None:
    """At least three slots, and with few tokens as many bytes in flight as hide the memory's latency."""
    for m in (1, 9, 17, 33, 100, 256, 3000):
        (launch,) = launches(find(card), HEAD.format(m))
        tokens = next((tokens for tokens in (8, 16, 32, 64) if m <= tokens), 128)
        slot = (128 + tokens) * 128
        assert launch.shared % slot == 0 and launch.shared // slot >= 3
        assert launch.shared >= 60 << 10
