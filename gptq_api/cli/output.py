"""What commands print: sentences in one line each, and a standard output that may go away."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from gptq_api.errors import printable
from gptq_api.logs import last_words

if TYPE_CHECKING:
    from rich.console import Console

_OUTPUT = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
"""what writing to an open file ends with; whoever writes to files of their own names them"""


def fail(command: str, error: object) -> None:
    """One line on standard error that says why the command ends."""
    last_words(f"gptq-api {command}: {printable(str(error))}")


def prepare() -> None:
    """Once per process: a character that the terminal's encoding lacks is escaped and no error, and a standard stream
    that is closed is /dev/null, so that its number is not that of the next file."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (for as long as the process lives)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            cast(Any, stream).reconfigure(errors="backslashreplace")


def with_output(command: str, work: Callable[[], int]) -> int:
    """The exit status of `work`, whose output may find its reader gone (`| head`: nothing is said, 1) or its disk full
    (a sentence, 1)."""
    try:
        try:
            status = work()
        except SystemExit as stop:  # behind --help
            status = int(stop.code or 0)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard()
        return 1
    except OSError as error:
        if error.filename is not None or error.errno not in _OUTPUT:
            raise
        _discard()
        with contextlib.suppress(OSError):
            fail(command, f"standard output cannot be written: {error.strerror}")
        return 1
    return status


def table_console() -> Console:
    """Standard output for tables: a terminal's width, and in a pipe or file, which have none, what a table takes."""
    from rich.console import Console  # which most commands do without

    return Console(width=None if sys.stdout.isatty() else 10_000, highlight=False, markup=False)


def _discard() -> None:
    """The interpreter's own flush at the end has nobody to fail at."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                os.dup2(null, stream.fileno())
