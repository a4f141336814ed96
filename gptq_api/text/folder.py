"""From `--model-path` to the checkpoint's folder, without importing anything heavy."""

from __future__ import annotations

from pathlib import Path

from gptq_api.on_disk import model_folder


def checkpoint_folder(model_path: str) -> Path:
    """`demo`, a checkpoint folder, or a weights file in one -> the folder. Raises FolderError."""
    if model_path == "demo":
        from gptq_api.demo import DEMO_PATH

        return Path(DEMO_PATH)
    return model_folder(Path(model_path).expanduser())
