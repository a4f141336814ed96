"""The one family of errors that are for people."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from gptq_api import exits


class UserError(Exception):
    """What is wrong, where, and the remedy: a sentence for the user.

    Commands print it and exit. Whatever else is raised is a bug of ours and keeps its traceback.
    """

    exit_status: ClassVar[int] = exits.FAILED


class ConfigError(UserError):
    """A setting is wrong; the text names the field, its source and the remedy."""

    exit_status = exits.WRONG_USE


@contextmanager
def writing(path: Path, num_bytes: int = 0, afterwards: str = "") -> Iterator[None]:
    """Around what writes to `path`: an error of the file system becomes a UserError that names it.

    Where there is no room: with the `num_bytes` that are needed and what there is, and what happens `afterwards`, when
    there is.
    """
    try:
        yield
    except OSError as error:
        sentence = f"{path} cannot be written: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and num_bytes:
            free = shutil.disk_usage(path.parent).free
            sentence += f"; it needs {_mib(num_bytes)} MiB and {_mib(free)} are free"
        elif error.errno == errno.EFBIG and num_bytes:
            sentence += f"; it needs {_mib(num_bytes)} MiB, and ulimit -f is lower"
        if afterwards:
            sentence += f"; {afterwards}"
        raise UserError(sentence) from None


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.{0 if num_bytes >= 10 * 2**20 else 2}f}"


def printable(text: str) -> str:
    """`text` on one line, with control characters and what is no text escaped: names of files and tensors come from
    others, and are for no terminal to obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
