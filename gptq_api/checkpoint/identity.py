"""Which checkpoint it is: what tells one from another in a few milliseconds, and since when it is there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from gptq_api.checkpoint.files import candidates
from gptq_api.on_disk import unreadable

_CONFIGS = ("config.json", "quantize_config.json", "generation_config.json")
_NUM_WINDOWS = 32
_WINDOW = 4096


class Identity(NamedTuple):
    digest: str
    """hexadecimal; the same for a copy elsewhere"""
    written: int
    """Unix time of the newest weights file, seconds"""


def identity(path: Path, ckpt: Path | None = None) -> Identity:
    """Of the weights that a model path names, by the names and sizes of their files, windows of 4 KiB spread over each,
    and the configs beside them: two quantizations of one model may differ in their packed weights only.

    CheckpointError where there are none.
    """
    files = sorted(file for weights in candidates(path, ckpt) for file in weights.files)
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(_windows(file))
    for config in (files[0].parent / name for name in _CONFIGS):
        digest.update(config.read_bytes() if unreadable(config) is None else b"none")
    written = (int(file.stat().st_mtime) for file in files if unreadable(file) is None)
    return Identity(digest.hexdigest(), max(written, default=0))


def _windows(file: Path) -> bytes:
    """Name, size and windows; the name alone of what cannot be read: whoever opens it says so."""
    if unreadable(file) is not None:
        return file.name.encode()
    size = file.stat().st_size
    parts = [f"{file.name} {size} ".encode()]
    with file.open("rb") as stream:
        for window in range(_NUM_WINDOWS):
            stream.seek(max(size - _WINDOW, 0) * window // (_NUM_WINDOWS - 1))
            parts.append(stream.read(_WINDOW))
    return b"".join(parts)
