"""A question and its answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """A user message, the only right answer, and (if any) what the user may ask next that refers to it."""

    user: str
    answer: str
    follow: Callable[[random.Random], Turn] | None = None
