"""The CPU kernels under sanitizers: `make sanitize-cpu`.

fuzz_cpu.cpp tries random shapes in every instruction set of this processor, AMX emulated, with AddressSanitizer and
UndefinedBehaviorSanitizer, and with ThreadSanitizer. Then the module itself, built with the first two, goes through the
tests of the kernels and of the native forward pass.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXT, HERE = ROOT / "ext", Path(__file__).parent
MEMORY, THREADS = "address,undefined", "thread"
TESTS = (
    "tests/kernels/test_cpu_native.py",
    "tests/runner/cpu/test_native_forward.py",
    "tests/runner/cpu/test_native_sampler.py",
)
_FLAGS = ("-std=c++20", "-g1", f"-I{EXT}", "-fno-sanitize-recover=all", "-ffp-contract=off", "-Wno-psabi")
_NATIVE = "portable"
_REPORTS = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


def instruction_sets() -> dict[str, list[str]]:
    """name -> the compiler's flags, of what the module is built with on x86."""
    listed = re.findall(r"^ +instruction_set\((\w+) ([^)]*)\)", (EXT / "cpu/module.cmake").read_text(), re.MULTILINE)
    return {_NATIVE: [], **{name: flags.split() for name, flags in listed}}


def build_fuzz(folder: Path, sanitizers: str, sets: Iterable[str], optimize: str = "-O1") -> Path:
    """The program, with these sets of those. subprocess.CalledProcessError where it does not compile."""
    flags = instruction_sets()
    defined = [f"-DGPTQ_CPU_{name.upper()}" for name in sets if name != _NATIVE]
    common = [*_FLAGS, optimize, f"-fsanitize={sanitizers}", *defined]
    emulated = [flag for flag in common if flag != "-DGPTQ_CPU_AMX"]  # the engine would ask the processor for tiles
    commands = []
    for name in sets:
        wanted = [flag for flag in flags[name] if not flag.startswith("-mamx")]
        tiles = ["-include", str(HERE / "emulated_tiles.h")] if name == "amx" else []
        commands.append([*emulated, *wanted, *tiles, str(EXT / f"cpu/linear_{name}.cpp")])
    commands += [[*emulated, str(EXT / f"cpu/{name}.cpp")] for name in ("engine", "pool", "pack")]
    commands.append([*common, str(HERE / "fuzz_cpu.cpp")])
    objects = [str(folder / f"{index}.o") for index in range(len(commands))]

    def compile_one(job: tuple[str, list[str]]) -> None:
        subprocess.run(["g++", "-c", "-o", job[0], *job[1]], check=True)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_one, zip(objects, commands, strict=True)))
    program = folder / "fuzz_cpu"
    subprocess.run(["g++", f"-fsanitize={sanitizers}", "-pthread", "-o", str(program), *objects], check=True)
    return program


def run_fuzz(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *arguments], env=os.environ | _REPORTS, capture_output=True, text=True, timeout=3600
    )


def fuzz(sanitizers: str, seed: int, rounds: int) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        program = build_fuzz(Path(folder), sanitizers, instruction_sets())
        if sanitizers == MEMORY and "heap-buffer-overflow" not in run_fuzz(program, "plant").stderr:
            print("what was planted was not found")
            return False
        done = run_fuzz(program, str(seed), str(rounds))
    print(f"-fsanitize={sanitizers}, seed {seed}\n{done.stdout}{done.stderr}", flush=True)
    return done.returncode == 0


def test_module(folder: Path) -> bool:
    """The tests of the module, in a Python whose module has the sanitizers in it."""
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), f"-Cbuild-dir={folder / 'build'}"]
    command += [
        "-Ccmake.build-type=Debug",
        f"-Ccmake.define.CMAKE_CXX_FLAGS=-O1 -fsanitize={MEMORY} -fno-sanitize-recover=all",
    ]
    environment = os.environ | {"GPTQ_API_CUDA": "off", "GPTQ_API_CPU": "on"}
    subprocess.run([*command, str(ROOT)], env=environment, check=True, stdout=subprocess.DEVNULL)
    (module,) = (folder / "build").glob("_cpu*.so")
    # Python finds neither by itself before torch brings the second one.
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    program = (
        "import importlib.util, sys, gptq_api, pytest\n"
        f"spec = importlib.util.spec_from_file_location('gptq_api._cpu', {str(module)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "sys.modules['gptq_api._cpu'] = gptq_api._cpu = module\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *{TESTS!r}]))\n"
    )
    environment |= _REPORTS | {"LD_PRELOAD": " ".join(runtimes)}
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2000, help="random shapes for each sanitizer")
    args = parser.parse_args()
    good = fuzz(MEMORY, args.seed, args.rounds) & fuzz(THREADS, args.seed, args.rounds // 4)
    with tempfile.TemporaryDirectory() as folder:
        good &= test_module(Path(folder))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
