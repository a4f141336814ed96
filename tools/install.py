"""The virtual environment of `make serve` and `make test`, and what is being done to it: what, how large, how long.

    python3 tools/install.py [--dev] [--venv .venv]
    python3 tools/install.py --list-dependencies events,otel > requirements.txt     # for images, whose layers are
    python3 tools/install.py --requirements requirements.txt --venv PLACE           # kept while these do not change

Does nothing where the environment is there and as new as pyproject.toml and constraints.txt. One whose Python is gone,
is too old or became another version is made anew. Where no GPU is seen torch's CPU build is installed: the one that pip
finds, the one at the index that the variable TORCH_INDEX names, or the one that `uv --torch-backend cpu` finds;
TORCH=cuda takes what pip finds. Needs the standard library alone, and runs on Pythons that the package does not.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (3, 11)
SILENCE_S = 5.0
"""the longest time without a line"""
SIZES = {"cpu": ("190 MB", "1 GB"), "cuda": ("2.7 GB", "6 GB")}
"""of torch's build, with what it asks for: to download, and with all else on disk"""
TOLD = re.compile(
    r"\s*((?:Downloading|Using cached) .*\.(?:whl|gz)|Building (?:editable|wheel) for .*started|Preparing .*started"
    r"|Installing (?:build|backend) dependencies.*started|Installing collected packages|Successfully installed"
    r"|ERROR|WARNING: Retrying|Cannot|Collecting \S+)"
)
"""those of pip's lines that say what it is at; all are in install.log"""


UNCOMPILED = "--no-compile"
"""pip would compile all modules of all libraries: 200 MB, of which a server imports a tenth"""
IMPORTED = ("gptq_api.api.server", "gptq_api.engine.process", "gptq_api.runner.load", "gptq_api.text.worker")
"""by the processes of a server"""
IMPORTING = "importing what a server does, which compiles it"


class InstallError(Exception):
    """One sentence for the user."""


def version_of(python: Path) -> str:
    """`3.12`; empty where it does not run."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([str(python), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return ""
    return done.stdout.decode().strip()


def refuse_old_python() -> None:
    """InstallError, with newer ones that are here."""
    if sys.version_info >= OLDEST:
        return
    names = ["python3.%d" % minor for minor in range(20, OLDEST[1] - 1, -1)]  # noqa: UP031  (for old Pythons)
    found = [name for name in names if version_of(Path(shutil.which(name) or "/nowhere"))]
    remedy = f"{found[0]} is here: make serve PYTHON={found[0]}" if found else "install a newer one"
    mine = ".".join(map(str, sys.version_info[:3]))
    raise InstallError(f"gptq-api needs Python 3.11 or newer, and {sys.executable} is {mine}; {remedy}")


def why_stale(venv: Path, must_be_mine: bool) -> str:
    """What is wrong with an environment that is there; empty where nothing is."""
    config = venv / "pyvenv.cfg"
    if not config.is_file():
        return "" if not venv.exists() or not any(venv.iterdir()) else "is no virtual environment"
    made = re.search(r"^version(?:_info)? *= *(\d+\.\d+)", config.read_text(), re.MULTILINE)
    now = version_of(venv / "bin" / "python")
    if not now:
        return "has a Python that does not run any more"
    if made is not None and made[1] != now:
        return f"was made by Python {made[1]}, which is {now} now"
    if tuple(map(int, now.split("."))) < OLDEST:
        return f"has Python {now}, and 3.11 is the oldest that will do"
    mine = "{}.{}".format(*sys.version_info[:2])
    return f"has Python {now}, and {mine} is asked for" if must_be_mine and now != mine else ""


def is_fresh(stamp: Path) -> bool:
    """Whether what was installed is as new as what says what to install."""
    wanted = max((ROOT / name).stat().st_mtime for name in ("pyproject.toml", "constraints.txt"))
    return stamp.exists() and stamp.stat().st_mtime >= wanted


class Talker:
    """Runs commands and says what they are at: at most SILENCE_S pass without a line."""

    def __init__(self, venv: Path) -> None:
        self.venv, self.began = venv, time.monotonic()
        self.temporary = venv / "tmp"  # pip's downloads, so that their growth is seen
        self.doing = ""

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:4.0f} s] {text}", flush=True)

    def run(self, what: str, command: list[str], extra: dict[str, str] | None = None) -> None:
        """InstallError with the command's last words where it fails."""
        self.say(what)
        self.doing = what
        self.temporary.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "TMPDIR": str(self.temporary), "PYTHONUNBUFFERED": "1", **(extra or {})}
        process = subprocess.Popen(
            command, cwd=str(ROOT), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(process.stdout, lines), daemon=True).start()
        said, last = [], time.monotonic()
        with (self.venv / "install.log").open("a", encoding="utf-8") as log:
            while True:
                try:
                    line = lines.get(timeout=max(0.0, last + SILENCE_S - time.monotonic()))
                except queue.Empty:
                    last = time.monotonic()
                    self.say(f"  ... {self.doing}; {self.on_disk()}")
                    continue
                if line is None:
                    break
                log.write(line + "\n")
                said.append(line)
                if TOLD.match(line):
                    self.doing = shortened(line)
                    self.say(f"  {self.doing}")
                    last = time.monotonic()
        shutil.rmtree(self.temporary, ignore_errors=True)
        if process.wait() != 0:
            tail = "\n".join(f"    {line}" for line in said[-25:])
            raise InstallError(f"{what} failed; the whole log is {self.venv / 'install.log'}\n{tail}")

    def on_disk(self) -> str:
        """How much is there."""
        if self.doing.startswith(("installing", IMPORTING)):
            return f"{sum(sizes(self.venv / 'lib')) / 1e6:.0f} MB installed"
        return f"{sum(sizes(self.temporary)) / 1e6:.0f} MB fetched or built"

    @staticmethod
    def _read(stream: Any, lines: queue.Queue[str | None]) -> None:
        for line in stream:
            lines.put(line.decode(errors="replace").rstrip())
        lines.put(None)


COMPILING = "compiling the kernels: the CPU's take half a minute, CUDA's, where there is a GPU, ten"


def shortened(line: str) -> str:
    """A line of pip's that fits on a screen."""
    text = line.strip().replace(": started", "").replace("(pyproject.toml)", "")
    text = re.sub(r"^Building \w+ for gptq-api.*", COMPILING, text)
    text = re.sub(r"^Collecting ([^ ]+).*", r"\1", text)
    if text.startswith(("Installing collected", "Successfully installed")):
        head, _, names = text.replace(": ", " ", 1).partition("packages" if "packages" in text else "installed")
        return f"{head.lower()}{'packages' if 'packages' in text else 'installed'}: {len(names.split())} of them"
    return text if len(text) <= 110 else f"{text[:107]}..."


def sizes(folder: Path) -> list[int]:
    """Of the files below it, some of which may go while it looks."""
    found = []
    for place, _, names in os.walk(str(folder)):
        for name in names:
            try:
                found.append(os.lstat(os.path.join(place, name)).st_size)
            except OSError:
                continue
    return found


def sees_gpu() -> bool:
    try:
        done = subprocess.run(["nvidia-smi"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return False
    return done.returncode == 0


def pip_takes_cuda(python: Path) -> bool:
    """Whether the torch that pip would install here asks for NVIDIA's libraries. Nothing is downloaded but metadata."""
    command = [str(python), "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    command += ["--report", "-", "--constraint", str(ROOT / "constraints.txt"), "torch"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        raise InstallError(f"pip finds no torch here:\n{done.stderr.decode(errors='replace').strip()}")
    (found,) = json.loads(done.stdout)["install"]
    wants = found["metadata"].get("requires_dist", [])
    return any(name.startswith(("nvidia-", "cuda-")) for name in wants)


def install_torch(talker: Talker, python: Path, *options: str) -> None:
    """The build that suits the machine, with more of pip's options. InstallError rather than CUDA's libraries where
    there is no GPU."""
    build = os.environ.get("TORCH") or ("cuda" if sees_gpu() else "cpu")
    if build not in ("cpu", "cuda"):
        raise InstallError(f"TORCH={build} is neither cpu nor cuda; leave it out to take what the machine needs")
    seen = "a GPU is seen" if sees_gpu() else "no GPU is seen"
    download, disk = SIZES[build]
    talker.say(
        f"{seen}: torch's {build.upper()} build, {download} to download; {disk} on disk with everything. "
        f"TORCH={'cuda' if build == 'cpu' else 'cpu'} takes the other build"
    )
    pip = [str(python), "-m", "pip", "install", "--constraint", str(ROOT / "constraints.txt"), "--progress-bar", "off"]
    pip += options
    index = os.environ.get("TORCH_INDEX")
    if index:
        more = " ".join(filter(None, (os.environ.get("PIP_EXTRA_INDEX_URL"), index)))
        talker.run(f"torch, also from {index}", [*pip, "torch"], {"PIP_EXTRA_INDEX_URL": more})
    elif build == "cuda" or not pip_takes_cuda(python):
        talker.run("torch", [*pip, "torch"])
    else:
        install_cpu_torch_with_uv(talker, python)


def install_cpu_torch_with_uv(talker: Talker, python: Path) -> None:
    """uv knows where torch's CPU builds are; it is fetched for this alone and not kept."""
    talker.say("pip would take the CUDA build here, 2.7 GB: uv, which knows where the CPU build is, fetches it instead")
    try:
        with tempfile.TemporaryDirectory() as folder:
            talker.run(
                "uv, 25 MB",
                [str(python), "-m", "pip", "install", "--progress-bar", "off", "--target", folder, "uv>=0.8"],
            )
            command = [str(Path(folder, "bin", "uv")), "pip", "install", "--python", str(python)]
            command += ["--torch-backend", "cpu", "--constraint", str(ROOT / "constraints.txt"), "torch"]
            talker.run("torch's CPU build, by uv", command)
    except InstallError as error:
        raise InstallError(
            f"{error}\ntorch's CPU build could not be had. TORCH_INDEX=ADDRESS names an index that has it (what "
            "pytorch.org/get-started says for pip and CPU), TORCH=cuda takes the CUDA build, 2.7 GB: "
            "make serve TORCH=cuda"
        ) from None


def remake(venv: Path, why: str, talker: Talker) -> None:
    if not (venv / "pyvenv.cfg").is_file():
        raise InstallError(f"{venv} {why}; move it away, or name another place: make serve VENV=PLACE")
    talker.say(f"{venv} {why}: it is made anew")
    shutil.rmtree(str(venv))


def install(venv: Path, dev: bool, must_be_mine: bool) -> None:
    stamp = venv / (".installed-dev" if dev else ".installed")
    why = why_stale(venv, must_be_mine)
    if not why and is_fresh(stamp):
        return
    if why or not (venv / "bin" / "python").exists():
        refuse_old_python()
    talker = Talker(venv)
    if why:
        remake(venv, why, talker)
    python = venv / "bin" / "python"
    if not python.exists():
        talker.run(f"a virtual environment in {venv}", [sys.executable, "-m", "venv", str(venv)])
    if not is_fresh(venv / ".installed"):
        install_torch(talker, python, UNCOMPILED)
    what = f"{ROOT}[dev]" if dev else str(ROOT)
    kernels = {} if sees_gpu() else {"GPTQ_API_CUDA": os.environ.get("GPTQ_API_CUDA", "off")}
    talker.run(
        "gptq-api and the libraries it needs" + (", and those of its tests (500 MB more on disk)" if dev else ""),
        [
            *(str(python), "-m", "pip", "install", "--progress-bar", "off", UNCOMPILED),
            *("--constraint", str(ROOT / "constraints.txt"), "--editable", what),
        ],
        kernels,
    )
    import_all = [str(python), "-c", f"import {', '.join(IMPORTED)}"]
    talker.run(IMPORTING, import_all, {"PYTHONDONTWRITEBYTECODE": ""})
    for made in (stamp, venv / ".installed"):
        made.touch()
    talker.say(f"installed in {venv}: {sum(sizes(venv)) / 1e9:.2f} GB")


def dependencies(extras: list[str]) -> list[str]:
    """What pyproject.toml asks for, with those of `extras`. InstallError for one that is not there."""
    import tomllib  # not before 3.11

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    for extra in extras:
        if extra not in optional:
            raise InstallError(f"{extra!r} is no extra of gptq-api; there are {', '.join(sorted(optional))}")
    return [*project["dependencies"], *(line for extra in extras for line in optional[extra])]


def install_requirements(venv: Path, requirements: Path) -> None:
    """torch, and what is listed, without gptq-api itself."""
    refuse_old_python()
    talker = Talker(venv)
    python = venv / "bin" / "python"
    talker.run(f"a virtual environment in {venv}", [sys.executable, "-m", "venv", str(venv)])
    if os.environ.get("TORCH") == "cuda" and not pip_takes_cuda(python):
        raise InstallError(
            "TORCH=cuda, and pip would take a build without CUDA here: look at its indexes and find-links"
        )
    install_torch(talker, python)
    talker.run(
        f"the libraries of {requirements.name}",
        [
            *(str(python), "-m", "pip", "install", "--progress-bar", "off"),
            *("--constraint", str(ROOT / "constraints.txt"), "--requirement", str(requirements)),
        ],
    )
    talker.say(f"installed in {venv}: {sum(sizes(venv)) / 1e9:.2f} GB")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the environment's folder")
    parser.add_argument("--dev", action="store_true", help="with what tests and linters need")
    parser.add_argument("--this-python", action="store_true", help="remake one that has another Python than this")
    parser.add_argument("--list-dependencies", metavar="EXTRAS", help="print what pyproject.toml asks for, and leave")
    parser.add_argument("--requirements", type=Path, help="install torch and what is listed there, not the package")
    options = parser.parse_args()
    try:
        if options.list_dependencies is not None:
            print(*dependencies([name for name in options.list_dependencies.split(",") if name]), sep="\n")
            return 0
        if options.requirements is not None:
            install_requirements(options.venv, options.requirements)
            return 0
        install(options.venv, options.dev, options.this_python)
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("install: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
