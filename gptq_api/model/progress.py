"""How far loading is: a bar on a terminal, a line now and then elsewhere, nothing at all for what is quick."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from gptq_api.logs import say

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_QUICK_S = 1.0
_LINE_S = 5.0


class LoadProgress:
    """Use in a `with` block; writes to stderr."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._next_line = time.monotonic() + (_QUICK_S if sys.stderr.isatty() else _LINE_S)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> LoadProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() < self._next_line or self._done == self._total:
            return
        elif sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._what, total=self._total, completed=self._done)
            self._bar.start()
        else:
            say(f"{self._what}: {self._done} of {self._total}")
            self._next_line = time.monotonic() + _LINE_S
