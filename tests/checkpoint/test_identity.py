"""One checkpoint is told from another, and from its own copy not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from gptq_api.checkpoint.identity import identity
from gptq_api.demo import DEMO_PATH


def test_a_copy_is_the_same_and_a_changed_weight_is_not(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(DEMO_PATH, copy)
    (weights,) = copy.glob("*.safetensors")
    os.utime(weights, (1_000_000_000, 1_000_000_000))
    assert identity(copy).digest == identity(Path(DEMO_PATH)).digest
    assert identity(copy).written == 1_000_000_000
    with weights.open("r+b") as stream:
        stream.seek(-10, os.SEEK_END)
        stream.write(b"\1\2\3")
    changed = identity(copy).digest
    assert changed != identity(Path(DEMO_PATH)).digest
    config = copy / "config.json"
    config.write_text(config.read_text() + " ")
    assert identity(copy).digest != changed
