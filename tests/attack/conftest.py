"""Code that runs in a child process before anything else does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def sitecustomize(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Takes code for every Python process of a server; returns the environment that brings it there."""

    def make(code: str) -> dict[str, str]:
        folder = tmp_path / "sitecustomize"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(code)
        return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}

    return make
