"""What tools/build_wheels.py lets pass; .ci/run builds a wheel with it and runs that."""

from __future__ import annotations

import base64
import hashlib
import runpy
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


def test_a_wheel_without_kernels_is_for_every_machine(tmp_path: Path) -> None:
    """.ci/run builds one; here the name and what stands in it, by the backend that renames it."""
    made = wheel(tmp_path, "cp311-cp311-linux_x86_64", modules=())
    told = "gptq_api-0.1.0.dist-info/WHEEL"
    with zipfile.ZipFile(made, "a") as archive:
        archive.writestr(told, "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp311-cp311-linux_x86_64\n")
        archive.writestr("gptq_api-0.1.0.dist-info/RECORD", f"{told},sha256=x,1\ngptq_api/py.typed,,\n")
    pytest.importorskip("scikit_build_core")
    build_backend = runpy.run_path(str(build_wheels.ROOT / "ext" / "build_backend.py"))
    renamed = build_backend["for_any_machine"](made)
    assert [file.name for file in tmp_path.iterdir()] == ["gptq_api-0.1.0-py3-none-any.whl"]
    with zipfile.ZipFile(renamed) as archive:
        text = archive.read(told)
        assert text == b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        digest = base64.urlsafe_b64encode(hashlib.sha256(text).digest()).rstrip(b"=").decode()
        records = archive.read("gptq_api-0.1.0.dist-info/RECORD").decode()
        assert records == f"{told},sha256={digest},{len(text)}\ngptq_api/py.typed,,\n"


def test_the_project_asks_for_torch_from_some_version_on() -> None:
    project = tomllib.loads((build_wheels.ROOT / "pyproject.toml").read_text())["project"]
    wants = "\n".join(f"Requires-Dist: {name}" for name in project["dependencies"])
    build_wheels.check_metadata(f"Version: {project['version']}\n{wants}\n")
