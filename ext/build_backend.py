"""scikit-build-core's build backend, but that a wheel without kernels says so in its name: `py3-none-any`.

CMake finds out while it builds whether there is a compiler, which is after scikit-build-core has chosen the tag.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path
from typing import Any

from scikit_build_core import build as backend
from scikit_build_core.build import *  # noqa: F403  (every hook there is)

__all__ = list(backend.__all__)


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """As PEP 517 says: the name of the wheel that lies in `wheel_directory`."""
    built = Path(wheel_directory) / backend.build_wheel(wheel_directory, config_settings, metadata_directory)
    with zipfile.ZipFile(built) as archive:
        has_modules = any(name.endswith(".so") for name in archive.namelist())
    return built.name if has_modules else for_any_machine(built).name


def for_any_machine(wheel: Path) -> Path:
    """The wheel with the tag py3-none-any in its name, its WHEEL and its RECORD, instead of the one it had."""
    name, version = wheel.name.split("-")[:2]
    told = f"{name}-{version}.dist-info/WHEEL"
    renamed = wheel.with_name(f"{name}-{version}-py3-none-any.whl")
    draft = wheel.with_name(f"{renamed.name}.partial")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as new:
        lines = [line for line in old.read(told).decode().splitlines() if line and not line.startswith("Tag: ")]
        lines = ["Root-Is-Purelib: true" if line.startswith("Root-Is-Purelib") else line for line in lines]
        text = "\n".join([*lines, "Tag: py3-none-any", ""]).encode()
        digest = base64.urlsafe_b64encode(hashlib.sha256(text).digest()).rstrip(b"=").decode()
        for item in old.infolist():
            content = old.read(item)
            if item.filename == told:
                content = text
            elif item.filename.endswith(".dist-info/RECORD"):
                records = content.decode().splitlines()
                ours = f"{told},sha256={digest},{len(text)}"
                records = [ours if line.startswith(f"{told},") else line for line in records]
                content = "\n".join([*records, ""]).encode()
            new.writestr(item, content)
    wheel.unlink()
    return draft.rename(renamed)
