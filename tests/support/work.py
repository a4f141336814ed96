"""What Python code costs, by a measure that neither the machine nor its other processes change."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def lines_run(function: Callable[[], object]) -> int:
    """Lines of Python that `function()` runs, in itself and in what it calls; those of a loop once each time."""
    num = 0

    def trace(_frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal num
        num += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return num
