"""tools/build_image.py: what of pip's settings reaches the build, which command is run, what is said of mistakes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import build_image
from tools.build_image import ImageError

LISTED = """\
:env:.cert='/etc/ssl/theirs.pem'
:env:.timeout='180'
global.cert='/etc/ssl/ours.pem'
global.constraint='/etc/pip/constraints.txt'
global.extra-index-url='file:///nowhere/simple https://user:word@packages.example.com/simple'
global.find-links='/nowhere {wheels}'
global.index-url='https://mirror.example.com/simple'
"""


def test_what_pip_is_told_here_holds_in_the_build(tmp_path: Path) -> None:
    settings = build_image.pip_settings(LISTED.format(wheels=tmp_path))
    assert build_image.pip_config(settings).splitlines() == [
        "[global]",
        "index-url = https://mirror.example.com/simple",
        "extra-index-url = https://user:word@packages.example.com/simple",
        "timeout = 180",
    ]
    assert settings["cert"] == "/etc/ssl/theirs.pem"
    assert build_image.wheels_of(settings) == tmp_path
    assert build_image.pip_config({}) == "" and build_image.wheels_of({}) is None


def test_pip_reads_what_is_written(tmp_path: Path) -> None:
    settings = build_image.pip_settings(LISTED.format(wheels=tmp_path))
    config = tmp_path / "pip.conf"
    config.write_text(build_image.pip_config(settings))
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    told = subprocess.run(
        [sys.executable, "-m", "pip", "--isolated", "config", "--global", "list"],
        capture_output=True,
        text=True,
        env={**bare, "PIP_CONFIG_FILE": str(config)},
        check=True,
    )
    assert not told.stderr


def test_secrets_are_files_outside_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    certificates = tmp_path / "ca.pem"
    certificates.touch()
    found = build_image.secrets({"cert": str(certificates), "index-url": "https://mirror.example.com"}, tmp_path)
    assert found == ["--secret", f"id=pip,src={tmp_path}/pip.conf", "--secret", f"id=ca,src={certificates}"]
    assert build_image.secrets({}, tmp_path) == []
    with pytest.raises(ImageError, match=r"no-such\.pem is no file"):
        build_image.secrets({"cert": "/no-such.pem"}, tmp_path)


@pytest.mark.parametrize("name", build_image.ENGINES)
def test_the_command(name: str) -> None:
    options = argparse.Namespace(device="cpu", extras="otel", base="base:1", cuda=None, tag="ours:1")
    command = build_image.build_command(name, options, ["--isolation", "chroot"])
    assert command[:2] == [name, "build"] and command[-1] == str(build_image.ROOT)
    assert ("docker" in command[2:]) == (name != "docker"), "only others have to be asked for a health check"
    assert {"DEVICE=cpu", "EXTRAS=otel", "BASE=base:1", f"VERSION={build_image.version()}"} <= {*command}
    assert not [word for word in command if word.startswith("CUDA=")]
    assert command[command.index("--tag") + 1] == "ours:1" and "--isolation" in command


def test_a_mistake_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImageError, match="none of docker, podman, buildah is on PATH"):
        build_image.engine()
    with pytest.raises(ImageError, match="--engine podman: it is not on PATH"):
        build_image.engine("podman")
    (tmp_path / "buildah").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "buildah").chmod(0o755)
    assert build_image.engine() == "buildah"
    command = [sys.executable, build_image.__file__, "--device", "cpu"]
    for more, says in ((("--wheels", "/nowhere"), "--wheels /nowhere is no folder"), ((), "could not build it")):
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
