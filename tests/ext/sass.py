"""What nvcc makes of a source of ext/: registers and spills as ptxas tells them, loops and operations as cuobjdump
prints them. Two packages of the `dev` extra bring cuobjdump and the nvdisasm that it starts."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest

EXT = Path(__file__).parents[2] / "ext"
NVCC = shutil.which("nvcc")
COMPILE_S = 400
"""nobody's compiler takes so long, but a busy machine's"""
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


@cache
def cuobjdump() -> Path:
    """That of the package, or else the one on PATH; without either a test is skipped, or fails where CI is set."""
    for package in ("nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"):
        try:
            found = [Path(str(file.locate())) for file in files(package) or []]
        except PackageNotFoundError:
            break
        tools = [path for path in found if path.parent.name == "bin" and path.stem == package.rpartition("-")[2]]
        if package.endswith("cuobjdump") and tools:
            path = tools[0]
        elif tools and tools[0].parent == path.parent:
            return path
    on_path = shutil.which("cuobjdump")
    if on_path is not None:
        return Path(on_path)
    reason = "needs cuobjdump and nvdisasm: pip install --constraint constraints.txt --editable '.[dev]'"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass(frozen=True)
class Instruction:
    address: int
    condition: str
    """"@!P0 " or nothing"""
    operation: str
    operands: str

    def is_a(self, operation: str) -> bool:
        """ "HMMA" is each HMMA, "HMMA.16816" those of that size."""
        return f"{self.operation}.".startswith(f"{operation}.")


class Compiler:
    """Compiles each source once for each architecture that is asked for, into a folder that processes may share; what a
    build of the module kept (keep.py) is taken as it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._done: dict[tuple[str, str], Compiled] = {}

    def __call__(self, source: str, arch: str) -> Compiled:
        """`source`: a path in ext/; `arch`: "80", "90a"."""
        if (source, arch) not in self._done:
            self._done[source, arch] = self._kept(source, arch) or self._compile(source, arch)
        return self._done[source, arch]

    def _kept(self, source: str, arch: str) -> Compiled | None:
        if "GPTQ_KEPT" not in os.environ:
            return None
        folder = Path(os.environ["GPTQ_KEPT"]) / Path(source).stem
        found = [*folder.glob(f"*.sm_{arch}.cubin"), *folder.glob(f"*.compute_{arch}.cubin")]
        return Compiled(found[0], arch, (folder / "ptxas.log").read_text()) if found else None

    def _compile(self, source: str, arch: str) -> Compiled:
        assert NVCC is not None
        out = self.folder / f"{Path(source).stem}.{arch}.cubin"
        flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        command = [NVCC, *flags, f"-I{EXT}", "-Xptxas=-v", "-cubin", "-o", str(out), str(EXT / source)]
        told = out.with_suffix(".log")
        with out.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not told.exists():
                done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S)
                assert done.returncode == 0, done.stderr
                told.write_text(done.stderr)
        return Compiled(out, arch, told.read_text())


@dataclass(frozen=True)
class Usage:
    registers: int
    stack: int
    """bytes of a thread's own memory: arrays that are indexed, and spills"""
    spills: int
    """bytes stored"""
    shared: int
    """bytes, without those that a launch adds"""


@dataclass(frozen=True)
class Compiled:
    cubin: Path
    arch: str
    log: str
    """what ptxas says, of other architectures as well where the module was built"""

    @property
    def usage(self) -> dict[str, Usage]:
        """By kernel."""
        pattern = (
            rf"entry function '(\w+)' for 'sm_{self.arch}'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?"
            r"Used (\d+) registers([^\n]*)"
        )
        found = {}
        for name, stack, spills, registers, rest in re.findall(pattern, self.log, re.DOTALL):
            shared = re.search(r"(\d+) bytes smem", rest)
            found[name] = Usage(int(registers), int(stack), int(spills), int(shared[1]) if shared else 0)
        return found

    @cached_property
    def code(self) -> dict[str, list[Instruction]]:
        """By kernel."""
        command = [str(cuobjdump()), "-sass", str(self.cubin)]
        sass = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        line = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);")
        return {
            text.split("\n", 1)[0]: [
                Instruction(int(address, 16), condition, operation, operands)
                for address, condition, operation, operands in line.findall(text)
            ]
            for text in re.split(r"\n\s*Function : ", sass)[1:]
        }


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of the loops, outer ones with the inner ones in them: from where a jump back goes to the jump. What
    a kernel does seldom, such as waiting once more, stands behind its end and is no loop although it jumps back."""
    place = {instruction.address: index for index, instruction in enumerate(code)}
    found = []
    for end, jump in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", jump.operands) if jump.is_a("BRA") else None
        start = place[int(target[1], 16)] if target else end
        body = code[start : end + 1]
        if start < end and not any(one.is_a("EXIT") and not one.condition for one in body):
            found.append(body)
    return found


def longest_by_products(code: list[Instruction], operation: str = "HMMA") -> dict[int, int]:
    """Tensor core products in the body of a loop -> the most instructions of a body with so many, loops aside that
    hold a smaller one with all their products. In the GEMVs a pair of strips whose sums of x are known takes 16 for a
    chunk and column tile, as does a single strip that computes them, in fewer instructions."""
    counted = [(sum(one.is_a(operation) for one in body), body) for body in loops(code)]
    most: dict[int, int] = {}
    for products, body in counted:
        first, last = body[0].address, body[-1].address
        holds_it = [
            other
            for number, other in counted
            if number == products and len(other) < len(body) and first <= other[0].address and other[-1].address <= last
        ]
        if not holds_it:
            most[products] = max(len(body), most.get(products, 0))
    return most
