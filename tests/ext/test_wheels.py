"""What tools/build_wheels.py lets pass; .ci/run builds a wheel with it and runs that."""

from __future__ import annotations

import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from tools import build_wheels

METADATA = "Metadata-Version: 2.4\nName: gptq-api\nVersion: 0.1.0\nRequires-Dist: torch>=2.11\n"


def wheel(folder: Path, tag: str, metadata: str = METADATA, modules: tuple[str, ...] = build_wheels.MODULES) -> Path:
    """One whose modules are torch's."""
    path = folder / f"gptq_api-0.1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in build_wheels.CONTENT:
            archive.writestr(name, "")
        for name in ("METADATA", "licenses/LICENSE", "licenses/NOTICE"):
            archive.writestr(f"gptq_api-0.1.0.dist-info/{name}", metadata)
        for name in modules:
            archive.write(torch._C.__file__, f"gptq_api/{name}.cpython-311-x86_64-linux-gnu.so")
    return path


@pytest.mark.parametrize(
    ("tag", "metadata", "modules", "complaint"),
    [
        ("cp311-cp311-linux_x86_64", METADATA, ("_cpu", "_cuda"), "for this machine alone"),
        ("py3-none-any", METADATA, ("_cpu", "_cuda"), "for this machine alone"),
        ("cp311-cp311-manylinux_2_28_x86_64", METADATA, ("_cpu",), r"_cpu.*\] and lacks \[\]"),
        ("cp311-cp311-manylinux_2_28_x86_64", METADATA.replace(">=", "=="), ("_cpu", "_cuda"), "torch==2.11, not"),
        ("cp311-cp311-manylinux_2_28_x86_64", METADATA.replace("0.1.0", "0.1.0+cu128"), ("_cpu", "_cuda"), "one build"),
        ("cp314-cp314-manylinux_2_27_x86_64.manylinux_2_28_x86_64", METADATA, ("_cpu", "_cuda"), "needs .*libtorch"),
    ],
)
def test_a_wheel_that_would_not_do_elsewhere(
    tag: str, metadata: str, modules: tuple[str, ...], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(build_wheels.WheelError, match=complaint):
        build_wheels.check(wheel(tmp_path, tag, metadata, modules), sys.executable)


def test_the_project_asks_for_torch_from_some_version_on() -> None:
    project = tomllib.loads((build_wheels.ROOT / "pyproject.toml").read_text())["project"]
    wants = "\n".join(f"Requires-Dist: {name}" for name in project["dependencies"])
    build_wheels.check_metadata(f"Version: {project['version']}\n{wants}\n")
