"""The folder in which a server keeps files and batches: who may have it open, what is on its disk, and files that are
whole or not there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from gptq_api.errors import UserError, writing

KEEP_FREE = 64 * 2**20
"""bytes of the disk that are left to others"""


class BatchFolderError(UserError):
    """The folder cannot be used: which, why, and the remedy."""


class BatchFolder:
    """Open in one process at a time; the kernel gives the lock back when that is gone, however it went."""

    def __init__(self, path: Path) -> None:
        """Makes it, for this user alone. Raises BatchFolderError."""
        self.path = path
        self._files = path / "files"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._files.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise BatchFolderError(f"the batch folder {path} cannot be made: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise BatchFolderError(
                f"the batch folder {path} is in use by another process; give each server one of its own"
            ) from None

    @property
    def database(self) -> Path:
        return self.path / "batches.sqlite3"

    def close(self) -> None:
        os.close(self._lock)

    def num_free(self) -> int:
        """Bytes that may still be written."""
        return max(0, shutil.disk_usage(self.path).free - KEEP_FREE)

    def file(self, file_id: str) -> Path:
        return self._files / file_id

    def keep_only(self, file_ids: Iterable[str]) -> None:
        """Remove what a process that was killed left half done."""
        known = set(file_ids)
        for path in self._files.iterdir():
            if path.name not in known:
                self.remove(path.name)

    def remove(self, file_id: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.file(file_id).unlink()

    @contextlib.contextmanager
    def new(self, file_id: str) -> Iterator[BinaryIO]:
        """A file that is there, whole and on the disk, when the block ends without an error, and not there otherwise.
        Nobody knows it before the database does."""
        with whole_file(self.file(file_id)) as file:
            yield file


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file by its whole content: it has its name, and is on the disk, when the block ends without an error.
    Raises UserError where it cannot be written."""
    part = path.with_name(path.name + ".part")
    try:
        with writing(path), part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            part.rename(path)
            _sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def copied(pieces: Iterable[bytes], write: Callable[[bytes], object]) -> int:
    """How many bytes they were."""
    size = 0
    for piece in pieces:
        write(piece)
        size += len(piece)
    return size
