"""The library by which Triton starts kernels, compiled beforehand, for machines without a C compiler.

    python launcher.py FOLDER       # for the Triton and the Python that run this; needs gcc, and no GPU

Triton compiles it where it is first needed, with gcc and Python's headers. It is the same for every kernel and GPU, and
so a container's image may bring it: in share/gptq-api/launcher of the environment. By name it belongs to one version of
Triton's source and of Python; any other is not looked at.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

PLACE = Path(sys.prefix, "share", "gptq-api", "launcher")
DRIVER = "libcuda.so.1"


class LauncherError(Exception):
    """One sentence."""


def compiler() -> str | None:
    """The C compiler that Triton would take."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def precompiled() -> Path | None:
    """The library for the Triton and Python that are here; None where there is none."""
    backend = _backend()
    if backend is None:
        return None
    path = PLACE / _name((backend / "driver.c").read_text(encoding="utf-8"))
    return path if path.is_file() else None


@cache
def use_precompiled() -> None:
    """Once per process: lets Triton take it, where there is no compiler. To be called before the first kernel is."""
    path = precompiled()
    if path is None or compiler() is not None:
        return
    from triton import knobs

    def instead(name: str, source: str, *_: object) -> str:
        if path.name != _name(Path(source).read_text(encoding="utf-8")):
            raise RuntimeError(f"Triton wants to compile {name}, and there is no C compiler; install gcc, or set CC")
        return str(path)

    knobs.build.impl = instead


def build(folder: Path) -> Path:
    """Compiles it into `folder`. LauncherError where that cannot be done or would not do."""
    backend, cc = _backend(), compiler()
    if backend is None:
        raise LauncherError("there is no triton with a backend for NVIDIA's GPUs; torch's CUDA builds bring it")
    if cc is None:
        raise LauncherError("there is no C compiler; install gcc, or set CC")
    if "__triton_launcher" in (backend / "driver.py").read_text(encoding="utf-8"):
        raise LauncherError("this triton compiles a launcher for every kernel; take 3.7 or later, or install gcc")
    source = backend / "driver.c"
    path = folder / _name(source.read_text(encoding="utf-8"))
    include = [f"-I{backend / 'include'}", f"-I{sysconfig.get_paths()['include']}"]
    with tempfile.TemporaryDirectory() as scratch:
        made, stub = Path(scratch, "driver.o"), Path(scratch, "stub")
        _run(cc, "-O3", "-fPIC", "-Wno-psabi", *include, "-c", str(source), "-o", str(made))
        stub.mkdir()
        _stand_in_for_the_driver(cc, made, stub)
        folder.mkdir(parents=True, exist_ok=True)
        link = ("-Wl,--no-as-needed", f"-L{stub}", f"-l:{DRIVER}")
        _run(cc, "-shared", str(made), "-o", str(path), *link)
        loads = (
            "import importlib.util as u, sys; u.module_from_spec(u.spec_from_file_location('cuda_utils', sys.argv[1]))"
        )
        _run(sys.executable, "-c", loads, str(path), LD_LIBRARY_PATH=str(stub))
    return path


def _backend() -> Path | None:
    """The folder of Triton's backend for NVIDIA's GPUs, without importing Triton."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "backends" / "nvidia"
    return folder if (folder / "driver.c").is_file() else None


def _name(source: str) -> str:
    return f"cuda_utils-{hashlib.sha256(source.encode()).hexdigest()[:16]}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _stand_in_for_the_driver(cc: str, made: Path, folder: Path) -> None:
    """A library with the name of NVIDIA's driver and the functions that are asked of it, to link with."""
    missing = re.findall(r"\bU (cu[A-Z]\w*)", _run("nm", "--undefined-only", str(made)))
    source = folder / "driver.c"
    source.write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in missing), encoding="utf-8")
    _run(cc, "-shared", "-fPIC", "-w", f"-Wl,-soname,{DRIVER}", str(source), "-o", str(folder / DRIVER))


def _run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    if done.returncode:
        raise LauncherError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
    return done.stdout


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python launcher.py FOLDER", file=sys.stderr)
        return 2
    try:
        print(build(Path(arguments[0])))
    except LauncherError as error:
        print(f"launcher: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
