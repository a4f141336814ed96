"""From `--model-path` to the checkpoint's folder, without importing anything heavy."""

from __future__ import annotations

from pathlib import Path

from gptq_api.errors import UserError


class FolderError(UserError):
    """`--model-path` names nothing that can be read: one sentence with the remedy."""


def checkpoint_folder(model_path: str) -> Path:
    """`demo`, a checkpoint folder, or a weights file in one -> the folder. Raises FolderError."""
    if model_path == "demo":
        from gptq_api.demo import DEMO_PATH

        return Path(DEMO_PATH)
    path = Path(model_path).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent
    raise FolderError(
        f"--model-path {model_path} does not exist: name a checkpoint folder, a file in one, a model on the Hugging "
        "Face hub (OWNER/NAME), or `demo`"
    )
