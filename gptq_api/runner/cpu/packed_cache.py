"""Packed weights kept from one start to the next, so that it takes the time of reading them.

    $XDG_CACHE_HOME/gptq-api/packed        (or ~/.cache, or --packed-cache DIR)
        vicuna-7b-0123456789abcdef.packed  one file for each checkpoint, the newest

What is kept was checked when it was packed, in a load that succeeded. It stands for the checkpoint as long as the key
is the same: names, types and shapes of its tensors, the zero points' version, the layout, and of each of its files
size, inode and times. Hashing the weights themselves would take the reading that is saved. The time of the last change
(ctime) is the system's and cannot be set back, and what has changed within the last seconds is not kept, since the next
change might show the same time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import stat
import threading
import time
from pathlib import Path

from gptq_api import __version__
from gptq_api.checkpoint.checkpoint import Checkpoint
from gptq_api.runner.cpu.packed_file import DamagedError, Packed, PackedFile, num_bytes, write

_log = logging.getLogger(__name__)

LEAST_BYTES = 64 * 2**20
"""of packed weights that are worth keeping: less is packed within a tenth of a second"""
SETTLED_S = 2.1
"""from the last change of a file until it is read; the coarsest clocks of file systems have 2 s"""
_SPARE_BYTES, _SPARE_PART = 2**30, 16
"""So much of a disk, or its sixteenth, is left to others"""
_ENDING = ".packed"
_NICE = 10


def cache_folder(setting: str) -> Path | None:
    """What --packed-cache means; None: nothing is kept."""
    if setting == "off":
        return None
    if setting != "auto":
        return Path(setting).expanduser()
    home = os.environ.get("XDG_CACHE_HOME", "")
    # relative ones are to be ignored, says the specification
    base = Path(home) if os.path.isabs(home) else Path("~/.cache").expanduser()
    return base / "gptq-api" / "packed"


def cache_file(folder: Path, checkpoint: Checkpoint) -> Path:
    """Where the packed weights of a checkpoint are kept."""
    source = str(checkpoint.files[0].resolve())
    name = re.sub(r"[^\w.-]+", "-", checkpoint.folder.resolve().name)[:80]
    return folder / f"{name}-{hashlib.blake2b(os.fsencode(source), digest_size=8).hexdigest()}{_ENDING}"


class RefusedError(Exception):
    """A folder or a file that others may have written; a sentence."""


class PackedCache:
    """The packed weights of one checkpoint: `take` what an earlier start kept, `put` what this one makes, and `keep` it
    when all of it has been loaded. Whatever is wrong with the folder is a line in the log and costs the packing."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, layout: str) -> None:
        """`layout`: whatever decides how tensors are packed and is not the checkpoint's."""
        self._checkpoint, self._layout = checkpoint, layout
        self.path = cache_file(folder, checkpoint)
        self._key, self._is_settled = _key(checkpoint, layout), _is_settled(checkpoint)
        self._packed: dict[str, Packed] = {}
        self._has_new, self._is_damaged = False, False
        self._file = self._open()

    def take(self, name: str) -> Packed | None:
        """MemoryError where there is not enough."""
        if self._file is None:
            return None
        try:
            packed = self._file.read(name)
        except (DamagedError, OSError) as error:
            self._tell_damaged(error)
            self.close()
            packed = None
        if packed is not None:
            self._packed[name] = packed
        return packed

    def put(self, name: str, packed: Packed) -> None:
        self._packed[name] = packed
        self._has_new = True

    def close(self) -> None:
        """Nothing is taken any more."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def keep(self) -> threading.Thread | None:
        """Begin to write, where anything was put. Call it once, at the end of a load that succeeded."""
        self.close()
        packed, self._packed = self._packed, {}
        if not self._has_new or not self._is_settled:
            return None
        thread = threading.Thread(target=self._write, args=(packed,), name="packed-cache", daemon=True)
        thread.start()
        return thread

    def _open(self) -> PackedFile | None:
        try:
            folder = _private_folder(self.path.parent, make=False)
            try:
                fd = os.open(self.path.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
            finally:
                os.close(folder)
            try:
                _refuse_others(fd, self.path)
            except RefusedError:
                os.close(fd)
                raise
        except FileNotFoundError:
            return None
        except (OSError, RefusedError) as error:
            _log.warning("packed weights are not used: %s", _sentence(error, self.path))
            return None
        try:
            file = PackedFile(fd)
            if file.key == self._key:
                return file
        except (DamagedError, OSError) as error:
            self._tell_damaged(error)
        os.close(fd)
        return None

    def is_kept(self) -> bool:
        """Now, by whichever process."""
        file = self._open()
        if file is not None:
            file.close()
        return file is not None

    def _tell_damaged(self, error: Exception) -> None:
        _log.warning("%s is damaged (%s); the weights are packed again", self.path, error)
        self._is_damaged = True

    def _write(self, packed: dict[str, Packed]) -> None:
        with contextlib.suppress(OSError):  # of this thread; a request that comes has the cores
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            folder = _private_folder(self.path.parent, make=True)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
                self._write_into(folder, packed)
            finally:
                os.close(folder)
        except (OSError, RefusedError) as error:
            _log.warning("packed weights are not kept: %s", _sentence(error, self.path))

    def _write_into(self, folder: int, packed: dict[str, Packed]) -> None:
        """Nobody else writes there until `folder` is closed."""
        if not self._is_damaged and self.is_kept():
            return
        _remove_orphans(folder, self.path.name)
        size, disk = num_bytes(packed), os.fstatvfs(folder)
        if size > disk.f_bavail * disk.f_frsize - min(_SPARE_BYTES, disk.f_blocks * disk.f_frsize // _SPARE_PART):
            raise RefusedError(f"{self.path.parent} has no room for {size >> 20} MiB")
        unfinished = f"{self.path.name}.unfinished"
        fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600, dir_fd=folder)
        try:
            write(fd, self._key, str(self._checkpoint.files[0].resolve()), packed)
            if _key(self._checkpoint, self._layout) == self._key:
                os.rename(unfinished, self.path.name, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            os.close(fd)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unfinished, dir_fd=folder)


def open_cache(setting: str, checkpoint: Checkpoint, layout: str) -> PackedCache | None:
    """None where nothing is to be kept: switched off, a small model, weights that are in no file."""
    folder = cache_folder(setting)
    if folder is None or not is_worth_keeping(checkpoint):
        return None
    try:
        return PackedCache(folder, checkpoint, layout)
    except OSError:
        return None


def is_worth_keeping(checkpoint: Checkpoint) -> bool:
    return sum(m.in_features * m.out_features * m.bits // 8 for m in checkpoint.modules.values()) >= LEAST_BYTES


def _key(checkpoint: Checkpoint, layout: str) -> str:
    """OSError where a file is gone."""
    store = checkpoint.store
    parts = [__version__, layout, str(checkpoint.zero_version)]
    parts += [f"{name} {store.dtype_name(name)} {store.shape(name)}" for name in sorted(store.names)]
    for file in checkpoint.files:
        found = file.stat()
        parts.append(f"{file.name} {found.st_size} {found.st_ino} {found.st_mtime_ns} {found.st_ctime_ns}")
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _is_settled(checkpoint: Checkpoint) -> bool:
    return time.time() - max(file.stat().st_ctime for file in checkpoint.files) > SETTLED_S


def _private_folder(path: Path, *, make: bool) -> int:
    """A descriptor of it. RefusedError, and OSError, FileNotFoundError where it is not there."""
    if make:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _refuse_others(fd, path)
    except RefusedError:
        os.close(fd)
        raise
    return fd


def _refuse_others(fd: int, path: Path) -> None:
    """Whoever may write there could make a model say what they like."""
    found = os.fstat(fd)
    if found.st_uid != os.geteuid():
        raise RefusedError(f"{path} belongs to user {found.st_uid}; name a folder of your own with --packed-cache")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RefusedError(f"others may write to {path}; chmod go-w {path}")


def _remove_orphans(folder: int, name: str) -> None:
    """Files of checkpoints that are gone, and what others did not finish; `name` is ours."""
    for other in os.listdir(folder):
        if other == name or not other.endswith((_ENDING, f"{_ENDING}.unfinished")):
            continue
        with contextlib.suppress(OSError):
            if not other.endswith(_ENDING) or _is_orphan(folder, other):
                os.unlink(other, dir_fd=folder)


def _is_orphan(folder: int, name: str) -> bool:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        return not os.path.exists(PackedFile(fd).source)
    except DamagedError:
        return True
    finally:
        os.close(fd)


def _sentence(error: Exception, path: Path) -> str:
    if isinstance(error, OSError):
        return f"{path}: {error.strerror or error}"
    return str(error)
