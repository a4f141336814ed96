"""Stands between CMake and nvcc, and keeps the machine code of each source with what ptxas says of it, so that tests
of ext/ need not compile the same again: .ci/run builds the wheel so, and names the folder to the tests in GPTQ_KEPT.

    CMAKE_CUDA_COMPILER_LAUNCHER="python3;tests/ext/keep.py;FOLDER" pip wheel .

sass.py reads FOLDER/STEM/*.cubin and FOLDER/STEM/ptxas.log. For any Python, of the standard library alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main(folder: str, *command: str) -> int:
    """The exit status of `command`, which is nvcc's."""
    sources = [Path(word) for word in command if word.endswith(".cu")]
    if "-c" not in command or len(sources) != 1:
        return subprocess.call(command)
    kept = Path(folder).absolute() / sources[0].stem
    kept.mkdir(parents=True, exist_ok=True)
    more = ("-Xptxas=-v", "--keep", f"--keep-dir={kept}")
    done = subprocess.run([*command, *more], stderr=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(done.stderr)
    (kept / "ptxas.log").write_text(done.stderr)
    for file in kept.iterdir():
        if file.suffix not in (".cubin", ".log"):
            file.unlink()
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
