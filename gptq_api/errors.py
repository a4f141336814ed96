"""The one family of errors that are for people."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """What is wrong, where, and the remedy: a sentence for the user.

    Commands print it and exit. Whatever else is raised is a bug of ours and keeps its traceback.
    """


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes to `path`: an error of the file system becomes a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def printable(text: str) -> str:
    """`text` on one line, with control characters and what is no text escaped: names of files and tensors come from
    others, and are for no terminal to obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
