"""The container image, built with what there is of docker, podman and buildah.

    python tools/build_image.py                        # gptq-api:cuda where a GPU is seen, else gptq-api:cpu
    python tools/build_image.py --device cuda --tag models.example.com/gptq-api:1
    python tools/build_image.py --base debian-python:bookworm -- --isolation chroot     # the engine's own options

`--base` is any image with Python 3.11 or newer, venv and apt. What pip is told on this machine (indexes, certificates,
a folder of wheels) holds in the build as well, and is in no layer of the image. Prints how large the image is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENGINES = ("docker", "podman", "buildah")
SETTINGS = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "retries", "no-index", "prefer-binary")
"""of pip's that mean the same elsewhere; `cert` and `find-links` are brought as files"""


class ImageError(Exception):
    """One sentence for the user."""


def engine(wanted: str | None = None) -> str:
    """The first of ENGINES that is here. ImageError where there is none."""
    for name in [wanted] if wanted else ENGINES:
        if shutil.which(name):
            return name
    if wanted:
        raise ImageError(f"--engine {wanted}: it is not on PATH")
    raise ImageError(f"none of {', '.join(ENGINES)} is on PATH; install one of them")


def pip_settings(listed: str) -> dict[str, str]:
    """What `pip config list` says (`global.index-url='...'`, `:env:.cert='...'`), by name: variables before files."""
    found: dict[str, str] = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:.")):
        name, equals, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if equals and section in ("global", "install", ":env:"):
            found[key] = value[1:-1].replace("\\n", "\n").strip()
    return found


def pip_config(settings: Mapping[str, str]) -> str:
    """A pip.conf of those that mean the same in the build; indexes that are folders of this machine are left out."""
    lines = []
    for name in SETTINGS:
        values = [word for word in settings.get(name, "").split() if not word.startswith(("file:", "/"))]
        if values:
            lines.append(f"{name} = {' '.join(values)}")
    return "\n".join(["[global]", *lines, ""]) if lines else ""


def wheels_of(settings: Mapping[str, str]) -> Path | None:
    """The folder of this machine in which pip looks for wheels."""
    for word in settings.get("find-links", "").split():
        path = Path(word.removeprefix("file://"))
        if path.is_dir():
            return path
    return None


def secrets(settings: Mapping[str, str], folder: Path) -> list[str]:
    """Options for what the build may see and no layer keeps; files are written into `folder`."""
    found = []
    if text := pip_config(settings):
        (folder / "pip.conf").write_text(text, encoding="utf-8")
        found += ["--secret", f"id=pip,src={folder / 'pip.conf'}"]
    certificates = settings.get("cert") or os.environ.get("SSL_CERT_FILE")
    if certificates:
        if not Path(certificates).is_file():
            raise ImageError(f"pip's cert = {certificates} is no file")
        found += ["--secret", f"id=ca,src={certificates}"]
    return found


def version() -> str:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def revision() -> str:
    """The commit, with `-dirty` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def build_command(name: str, options: argparse.Namespace, extra: list[str]) -> list[str]:
    """With `--format docker`, since OCI's format has no place for a health check."""
    arguments = {
        "DEVICE": options.device,
        "EXTRAS": options.extras,
        "VERSION": version(),
        "REVISION": revision(),
        "CREATED": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if options.base:
        arguments["BASE"] = options.base
    if options.cuda:
        arguments["CUDA"] = options.cuda
    command = [name, "build"] + ([] if name == "docker" else ["--format", "docker", "--layers"])
    for key, value in arguments.items():
        command += ["--build-arg", f"{key}={value}"]
    return [*command, *extra, "--tag", options.tag, "--file", str(ROOT / "Dockerfile"), str(ROOT)]


def size_of(name: str, tag: str) -> int:
    """Bytes of the unpacked image."""
    if name == "buildah":  # which says it in words: 1.49 GB
        done = subprocess.run([name, "images", "--json", tag], capture_output=True, text=True, check=True)
        number, unit = str(json.loads(done.stdout)[0]["size"]).split()
        return round(float(number) * {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit.upper()])
    command = [name, "image", "inspect", "--format", "{{.Size}}", tag]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def sees_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def pip_config_list() -> str:
    command = [sys.executable, "-m", "pip", "config", "list"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def build(options: argparse.Namespace) -> int:
    """The size in bytes. ImageError where it fails."""
    name = engine(options.engine)
    settings = pip_settings(pip_config_list())
    wheels = options.wheels or wheels_of(settings)
    if wheels is not None and not wheels.is_dir():
        raise ImageError(f"--wheels {wheels} is no folder")
    with tempfile.TemporaryDirectory() as folder:
        extra = secrets(settings, Path(folder))
        if wheels is not None:
            extra += ["--build-context", f"wheels={wheels}"]
        command = build_command(name, options, [*extra, *options.rest])
        print(
            f"{options.tag} for {options.device.upper()}, with {name}: some five minutes, and ten more for CUDA",
            flush=True,
        )
        if subprocess.run(command, check=False).returncode:
            raise ImageError(f"{name} could not build it; the reason stands above")
    return size_of(name, options.tag)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: as this machine has a GPU or none")
    parser.add_argument("--tag", help="the image's name; default gptq-api:DEVICE")
    parser.add_argument("--base", help="the image to begin with; default python:3.12-slim")
    parser.add_argument("--extras", default="events,otel", help="extras of the package that are installed with it")
    parser.add_argument("--cuda", metavar="RELEASE", help="of NVIDIA's compiler, for --device cuda; default 13.0")
    parser.add_argument("--engine", choices=ENGINES, help="default: the first that is here")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to take before an index is asked")
    parser.add_argument("rest", nargs="*", metavar="-- OPTION", help="the engine's own options")
    options = parser.parse_args()
    options.device = options.device or ("cuda" if sees_gpu() else "cpu")
    options.tag = options.tag or f"gptq-api:{options.device}"
    try:
        size = build(options)
    except ImageError as error:
        print(f"build_image: {error}", file=sys.stderr)
        return 1
    print(f"{options.tag}: {size / 1e9:.2f} GB unpacked")
    return 0


if __name__ == "__main__":
    sys.exit(main())
