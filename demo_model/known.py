"""What the demo model knows by heart, read from phrases/*.json: fixed answers, terms, flags, refusals.

Answers never vary: a variant costs robustness at temperature 0.7 and teaches nothing. The order of the entries and of
their questions is part of the data, since the generator draws by position.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHRASES = Path(__file__).parent / "phrases"


@dataclass(frozen=True)
class Fixed:
    """Several ways to ask, one answer."""

    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Topic:
    """Something one asks "what is ..." about: its names (as people write them, common misspellings included), one short
    answer and sometimes a long one."""

    names: tuple[str, ...]
    answer: str
    long: str | None = None


@dataclass(frozen=True)
class Refusal:
    """A kind of question that the model does not answer: patterns with {x}, and words for {x}."""

    answer: str
    patterns: tuple[str, ...]
    things: tuple[str, ...]


def phrases(name: str) -> Any:
    return json.loads((PHRASES / f"{name}.json").read_text(encoding="utf-8"))


def _fixed(name: str) -> tuple[Fixed, ...]:
    return tuple(Fixed(tuple(item["questions"]), item["answer"]) for item in phrases(name))


HOWTO = _fixed("howto")
"""using gptq-api"""
SMALL_TALK = _fixed("small_talk")
"""the model itself, and small talk"""
TERMS = tuple(Topic(tuple(item["names"]), item["answer"], item.get("long")) for item in phrases("topics"))

_flags = phrases("flags")
FLAGS: dict[str, str] = _flags["flags"]
"""flag of `gptq-api serve`: what it does"""
FLAG_LIST: str = _flags["list"]

_refusals = phrases("refusals")
REFUSALS = {
    name: Refusal(item["answer"], tuple(item["patterns"]), tuple(item["things"]))
    for name, item in _refusals["categories"].items()
}
GENERAL = REFUSALS["general"].answer
CODE_TASKS = tuple(_refusals["code_tasks"])
CODE_NOUNS = tuple(_refusals["code_nouns"])
BIG_SUM: str = _refusals["big_sum"]
BIG_TIMES: str = _refusals["big_times"]
NO_DIVISION: str = _refusals["no_division"]
BIG_COUNT: str = _refusals["big_count"]
NO_CAPITAL: str = _refusals["no_capital"]
