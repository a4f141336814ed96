"""What the demo model knows by heart, read from phrases/*.json: fixed answers, terms, flags, refusals.

Answers never vary: a variant costs robustness at temperature 0.7 and teaches nothing. The order of the entries and of
their questions is part of the data, since the generator draws by position.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHRASES = Path(__file__).parent / "phrases"
NEWCOMERS = Path(__file__).parents[1] / "tests/demo_newcomers.json"
"""a hundred questions of newcomers with what a right answer has, which the tests ask"""


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
    slots: dict[str, tuple[str, ...]]
    """words for other slots"""


@dataclass(frozen=True)
class Fact:
    """Something newcomers ask for, see newcomer_skills.py. about: the list of names in the place of everything else."""

    answer: str
    questions: tuple[str, ...] = ()
    nouns: tuple[str, ...] = ()
    platforms: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    about: str | None = None


def phrases(name: str) -> Any:
    return json.loads((PHRASES / f"{name}.json").read_text(encoding="utf-8"))


def _fixed(name: str) -> tuple[Fixed, ...]:
    return tuple(Fixed(tuple(item["questions"]), item["answer"]) for item in phrases(name))


def _lists(raw: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(items) for name, items in raw.items()}


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
    name: Refusal(item["answer"], tuple(item["patterns"]), tuple(item["things"]), _lists(item.get("slots", {})))
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

_follow_ups = _lists(phrases("follow_ups"))
AGAIN, SHORTER = _follow_ups["again"], _follow_ups["shorter"]
"""how one asks for the last answer again, and for its first sentence"""

_newcomers = phrases("newcomers")


def _fact(item: dict[str, Any]) -> Fact:
    questions, nouns, platforms, tasks = (
        tuple(item.get(kind, ())) for kind in ("questions", "nouns", "platforms", "tasks")
    )
    return Fact(item["answer"], questions, nouns, platforms, tasks, item.get("about"))


FACTS = tuple(map(_fact, _newcomers["facts"]))
ABOUT = _lists(_newcomers["about"])
"""what is asked about: sentences with {t} in its place"""
CONTEXTS = tuple(_newcomers["contexts"])
"""what some say before they ask"""
MEMORY = _lists(_newcomers["memory"])
"""how one asks what a model of {n} billion weights needs, and what fits into {g} GB"""
NAMES_OF = _lists(_newcomers["names"])
"""kind of program or model: their names"""


def normal(text: str) -> str:
    """A question without case, marks and spaces."""
    return re.sub(r"[^a-z0-9+*/=-]", "", text.lower())


def held_out() -> frozenset[str]:
    """Questions that measure the model, as `normal` spells them: the generator does not ask them."""
    lists = [phrases("held_out"), phrases("held_out_newcomers"), json.loads(NEWCOMERS.read_text(encoding="utf-8"))]
    return frozenset(normal(item["question"]) for items in lists for item in items)
