"""A model's files as files: which folder a path means, and what is wrong with one before anyone looks into it. Weights,
configs and tokenizers are told of in the same words."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from gptq_api.errors import UserError

_LFS_HEAD = b"version https://git-lfs.github.com/spec/"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""what some editors put in front of UTF-8; it belongs to no JSON and to no template"""


class FolderError(UserError):
    """A model path names nothing that can be read: one sentence with the remedy."""


def model_folder(path: Path) -> Path:
    """The folder a model path means: itself, or that of the weights file it names. FolderError where there is none."""
    try:
        kind = path.stat().st_mode
        folder = path if stat.S_ISDIR(kind) else path.parent
        os.listdir(folder)
        os.stat(folder / ".")
    except FileNotFoundError as error:
        if path.is_symlink():
            raise FolderError(cannot_be_read(path, error)) from None
        raise FolderError(
            f"{path} does not exist; --model-path takes a checkpoint folder, a file in one, a model on the Hugging "
            "Face hub (OWNER/NAME), or `demo`"
        ) from None
    except OSError as error:
        raise FolderError(cannot_be_read(path, error)) from None
    return folder


def is_there(path: Path) -> bool:
    """Whether the folder has an entry by that name, readable or not: a link into nothing is there as well."""
    return os.path.lexists(path)


def unreadable(path: Path) -> str | None:
    """A sentence where the content of `path` cannot be had: no such file, no permission, a link into nothing, a pointer
    of git-lfs; None where it can."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return f"{path} is no file; give the file itself"
        with path.open("rb") as file:
            head = file.read(len(_LFS_HEAD))
    except OSError as error:
        return cannot_be_read(path, error)
    if head == _LFS_HEAD:
        return f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in {path.parent}"
    return None


def cannot_be_read(path: Path, error: OSError) -> str:
    """A sentence with the file, the reason and the remedy."""
    if error.errno == errno.ENOENT and path.is_symlink():
        return f"{path} is a link to {os.readlink(path)}, which is not there; download it again"
    remedy = {
        errno.ENOENT: "download it",
        errno.EACCES: f"let user {os.geteuid()} read it",
        errno.EPERM: f"let user {os.geteuid()} read it",
        errno.ELOOP: "download it again",
        errno.EIO: "the disk may be failing; copy the file from elsewhere",
        errno.ENOMEM: "free some memory, or raise the limit this process runs under (ulimit -v)",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
    }.get(error.errno or 0)
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"{path} cannot be read: {reason}" + (f"; {remedy}" if remedy else "")


def without_mark(data: bytes) -> bytes:
    """UTF-8 without a byte order mark in front."""
    return data.removeprefix(BYTE_ORDER_MARK)
