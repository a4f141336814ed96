"""Binary wheels with both kernel modules: one for each Python, for any Linux with a glibc as old as this machine's.

    python tools/build_wheels.py --out dist                # for this Python, with the nvcc on PATH or in CUDACXX
    python tools/build_wheels.py --out dist --python python3.12 python3.13
    python tools/build_wheels.py --out dist --cuda 13.0    # with NVIDIA's compiler from PyPI

From the source distribution, which is left in `--out` as well. Each interpreter needs pip and its headers. A wheel has
nothing of torch in it and is for no version of it. The CUDA runtime is in it, so the release of the compiler says which
drivers it needs: of 12.8 and 12.9, from 525 on; of 13.x, from 580 on. PyPI has the whole compiler from 13.0 on, and of
12.8 all but nvcc itself; .github/workflows/wheels.yml builds with 12.8, in a container of an old glibc.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ("build", "auditwheel>=6.4", "patchelf>=0.17")
COMPILER = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
MODULES = ("_cpu", "_cuda")
CONTENT = ("gptq_api/py.typed", "gptq_api/demo/model/model.safetensors")
SYSTEM_LIBRARIES = re.compile(r"(libc|libm|libdl|librt|libpthread|ld-linux-[\w-]+)\.so\.\d+")
"""that every Linux with glibc has; anything else a module asks for would be missing somewhere"""
MODULE_BYTES, WHEEL_BYTES = 17 << 19, 20 << 20
"""the demo model is half of a wheel"""
IMPORT = """
import importlib.machinery, importlib.util, sys
name, path = sys.argv[1:]
loader = importlib.machinery.ExtensionFileLoader("gptq_api." + name, path)
loader.exec_module(importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader)))
"""


class WheelError(Exception):
    """A wheel that would not do elsewhere; the message says why."""


def needed(module: Path) -> list[str]:
    """The shared libraries that a module asks for."""
    said = subprocess.run(["readelf", "-d", str(module)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", said)


def check_metadata(text: str) -> None:
    """The version has no local part, and torch is asked for by its oldest version alone."""
    version = re.search(r"^Version: (.*)$", text, re.M)
    if version is None or "+" in version[1]:
        raise WheelError(f"the version {version and version[1]} belongs to one build")
    wants = re.findall(r"^Requires-Dist: torch\b(.*)$", text, re.M)
    if len(wants) != 1 or not re.fullmatch(r">=[\d.]+", wants[0].strip()):
        raise WheelError(f"it wants torch{', torch'.join(wants)}, not torch from some version on")


def check(wheel: Path, python: str) -> list[str]:
    """Lines about a wheel that can be given away. WheelError where it cannot."""
    tag = "-".join(wheel.stem.split("-")[-3:])
    if not re.fullmatch(r"cp3\d+-cp3\d+t?-(manylinux_2_\d+_\w+\.?|manylinux2014_\w+\.?)+", tag):
        raise WheelError(f"{wheel.name}: {tag} is for this machine alone")
    if wheel.stat().st_size > WHEEL_BYTES:
        raise WheelError(f"{wheel.name} has {wheel.stat().st_size} bytes, more than {WHEEL_BYTES}")
    lines = [f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB"]
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        found = {name.rpartition("/")[2].partition(".")[0]: name for name in names if name.endswith(".so")}
        libraries = [name for name in names if re.match(r"gptq_api\.libs/.", name)]
        missing = [name for name in CONTENT if name not in names]
        missing += [name for name in ("LICENSE", "NOTICE") if not any(n.endswith(f"licenses/{name}") for n in names)]
        if set(found) != set(MODULES) or libraries or missing:
            raise WheelError(f"{wheel.name} holds {[*found.values(), *libraries]} and lacks {missing}")
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        check_metadata(archive.read(metadata).decode())
        for name, inside in found.items():
            module = Path(archive.extract(inside, folder))
            size, wants = module.stat().st_size, needed(module)
            if size > MODULE_BYTES:
                raise WheelError(f"{inside} has {size} bytes, more than {MODULE_BYTES}")
            if foreign := [library for library in wants if not SYSTEM_LIBRARIES.fullmatch(library)]:
                raise WheelError(f"{inside} needs {', '.join(foreign)}")
            subprocess.run([python, "-I", "-c", IMPORT, name, str(module)], check=True)
            lines.append(f"  {inside}: {size / 1e6:.1f} MB, imports here, needs {' '.join(wants)}")
    return lines


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment
    )
    if done.returncode:
        sys.exit(f"{done.stdout[-6000:]}\n{' '.join(command)}: exit status {done.returncode}")


def compiler(release: str, folder: Path) -> Path:
    """nvcc of a release, such as 13.0, from PyPI into `folder`."""
    packages = [f"{name}=={release}.*" for name in COMPILER]
    run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages])
    root = next(folder.glob("nvidia/cu*"))
    if not (root / "lib64").exists():  # where nvcc looks for the runtime
        (root / "lib64").symlink_to("lib")
    return root / "bin" / "nvcc"


def build(pythons: list[str], out: Path, nvcc: str, scratch: Path) -> list[Path]:
    """A wheel for each interpreter, beside the source distribution they are made of."""
    run([sys.executable, "-m", "venv", str(scratch / "tools")])
    python = str(scratch / "tools" / "bin" / "python")
    run([python, "-m", "pip", "install", "--quiet", *TOOLS])
    run([python, "-m", "build", "--sdist", "--outdir", str(scratch / "sdist"), str(ROOT)])
    source = next((scratch / "sdist").glob("*.tar.gz"))
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, out)
    environment = os.environ | {"GPTQ_API_CUDA": "on", "GPTQ_API_CPU": "on", "CUDACXX": nvcc}
    # auditwheel runs patchelf
    repair = environment | {"PATH": f"{scratch / 'tools' / 'bin'}:{os.environ['PATH']}"}
    wheels = []
    for i, interpreter in enumerate(pythons):
        raw, repaired = scratch / f"raw-{i}", scratch / f"repaired-{i}"
        run([interpreter, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(raw), str(source)], environment)
        made = str(next(raw.glob("*.whl")))
        run([python, "-m", "auditwheel", "repair", "--wheel-dir", str(repaired), made], repair)
        wheel = next(repaired.glob("*.whl"))
        print("\n".join(check(wheel, interpreter)), flush=True)
        wheels.append(Path(shutil.copy(wheel, out)))
    return wheels


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for what is built")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters, a wheel for each")
    parser.add_argument("--cuda", metavar="RELEASE", help="take NVIDIA's compiler of this release from PyPI: 13.0")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        nvcc = str(compiler(options.cuda, scratch / "cuda")) if options.cuda else os.environ.get("CUDACXX", "nvcc")
        if shutil.which(nvcc) is None:
            sys.exit(f"no {nvcc} on PATH: install a CUDA toolkit, or say --cuda 13.0")
        try:
            build(options.python, options.out.absolute(), nvcc, scratch)
        except WheelError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
