"""Environments of the clients, outside ours: `python -m tests.clients.environments [NAME ...]` makes those that are
missing or whose pins have changed, under .clients/; tests ask here where one is, and skip where it is not."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PINS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("environments.toml").read_text(encoding="utf-8"))
NAMES = (*PINS["python"], *PINS["node"])


def cache() -> Path:
    return Path(os.environ.get("CLIENTS_DIR", ROOT / ".clients"))


def pins(name: str) -> dict[str, Any]:
    """What the environment of a client is made from."""
    return {kind: PINS[kind][name] for kind in PINS if name in PINS[kind]}


def is_made(name: str) -> bool:
    stamp = cache() / name / "made.json"
    return stamp.exists() and json.loads(stamp.read_text()) == pins(name)


def folder(name: str) -> Path:
    """Of a client that is installed; the test is skipped where it is not."""
    if not is_made(name):
        pytest.skip(f"{name} is not installed: make clients")
    return cache() / name


def make(name: str) -> None:
    where = cache() / name
    shutil.rmtree(where, ignore_errors=True)
    wanted = pins(name)
    if "python" in wanted:
        venv.create(where, with_pip=True)
        _run(str(where / "bin" / "python"), "-m", "pip", "install", "--quiet", *wanted["python"])
    else:
        where.mkdir(parents=True)
        # Each package brings its binary as a package of its own: nothing else has to run.
        options = ("--no-fund", "--no-audit", "--ignore-scripts", "--loglevel", "error")
        _run("npm", "install", *options, "--prefix", str(where), *wanted["node"])
        _link_binaries(where)
    if "sources" in wanted:
        python = str(where / "bin" / "python")
        _run(
            python,
            *("-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"),
            *("--dest", str(where / "sdist"), wanted["sources"]),
        )
        (archive,) = (where / "sdist").glob("*.tar.gz")
        with tarfile.open(archive) as source:
            source.extractall(where / "sdist", filter="data")
    (where / "made.json").write_text(json.dumps(wanted))


def _link_binaries(where: Path) -> None:
    """Two packages hold a placeholder that their install script replaces by the binary of the platform's package."""
    for package, platforms, binary in (
        ("@anthropic-ai/claude-code", "@anthropic-ai/claude-code", "claude"),
        ("opencode-ai", "opencode", "opencode"),
    ):
        place = where / "node_modules" / package / "bin" / f"{binary}.exe"
        machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), "")
        built = sorted((where / "node_modules").glob(f"{platforms}-linux-{machine}/**/{binary}"))
        if place.exists() and built:
            place.unlink()
            os.link(built[0], place)
            place.chmod(0o755)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def main(names: list[str]) -> int:
    """Makes what is missing. What cannot be installed is said, and its tests are skipped."""
    failed = []
    for name in names or NAMES:
        if not is_made(name):
            print(f"installing {name}", flush=True)
            try:
                make(name)
            except (subprocess.CalledProcessError, OSError) as error:
                failed.append(name)
                print(f"{name} cannot be installed: {error}", file=sys.stderr)
    if failed:
        print(f"not installed: {', '.join(failed)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
