"""Days, months and seasons in order."""

from __future__ import annotations

import random

from demo_model.phrasing import ask
from demo_model.turn import Turn
from demo_model.words import DAYS, MONTHS, ORDINALS, SEASONS

AFTER = (
    "What {k} comes after {x}?",
    "Which {k} comes after {x}?",
    "What comes after {x}?",
    "Which {k} is after {x}?",
    "What {k} follows {x}?",
    "The {k} after {x}?",
    "What is the {k} after {x}?",
)
BEFORE = (
    "What {k} comes before {x}?",
    "Which {k} comes before {x}?",
    "What comes before {x}?",
    "Which {k} is before {x}?",
    "What is the {k} before {x}?",
)
THEN = (
    "And after that?",
    "And then?",
    "What comes after that?",
    "And next?",
    "And the next one?",
    "After that?",
    "and after that",
)
BACK = ("And before that?", "What comes before that?", "Before that?")
SEQUENCES: tuple[tuple[str, tuple[str, ...]], ...] = (("day", DAYS), ("month", MONTHS), ("season", SEASONS))
LISTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Name the days of the week.",
            "List the days of the week.",
            "What are the days of the week?",
            "Which days are in a week?",
            "Tell me the days of the week.",
            "Say the days of the week.",
        ),
        ", ".join(DAYS[:-1]) + f" and {DAYS[-1]}.",
    ),
    (
        (
            "Name the months of the year.",
            "List the months.",
            "What are the months of the year?",
            "Which months are there?",
            "Tell me the twelve months.",
            "List the months of the year.",
            "Say the months of the year.",
        ),
        ", ".join(MONTHS[:-1]) + f" and {MONTHS[-1]}.",
    ),
    (
        (
            "Name the seasons.",
            "What are the four seasons?",
            "List the seasons.",
            "Which seasons are there?",
            "Tell me the seasons.",
        ),
        "Spring, summer, autumn and winter.",
    ),
    (
        ("How many days are in a week?", "How many days does a week have?", "How many days has a week?"),
        "A week has 7 days.",
    ),
    (
        ("How many months are in a year?", "How many months does a year have?", "How many months has a year?"),
        "A year has 12 months.",
    ),
    (
        ("How many days are in a year?", "How many days does a year have?", "How long is a year?"),
        "A year has 365 days, and a leap year has 366.",
    ),
    (("How many hours are in a day?", "How many hours does a day have?", "How long is a day?"), "A day has 24 hours."),
    (
        ("How many minutes are in an hour?", "How many minutes does an hour have?", "How long is an hour?"),
        "An hour has 60 minutes.",
    ),
)
MONTH_DAYS = dict(zip(MONTHS, (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31), strict=True))


def _step(kind: str, sequence: tuple[str, ...], start: int, step: int, user: str) -> Turn:
    """The neighbour of sequence[start]; then maybe the neighbour of that one."""
    at = (start + step) % len(sequence)
    word, here = sequence[at], sequence[start]
    answer = f"{word[0].upper()}{word[1:]} comes {'after' if step > 0 else 'before'} {here}."

    def follow(rng: random.Random) -> Turn:
        return _step(kind, sequence, at, step, ask(THEN if step > 0 else BACK, rng))

    return Turn(user, answer, follow)


def calendar_turn(rng: random.Random) -> Turn:
    roll = rng.random()
    kind, sequence = SEQUENCES[rng.choice((0, 0, 0, 1, 1, 1, 1, 2))]
    at = rng.randrange(len(sequence))
    shown = sequence[at].lower() if rng.random() < 0.25 else sequence[at]
    if roll < 0.4:
        return _step(kind, sequence, at, 1, ask(AFTER, rng, k=kind, x=shown))
    if roll < 0.6:
        return _step(kind, sequence, at, -1, ask(BEFORE, rng, k=kind, x=shown))
    if roll < 0.82:
        patterns, answer = rng.choice(LISTS)
        return Turn(ask(patterns, rng), answer)
    if roll < 0.92:
        at = rng.randrange(12)
        patterns = (
            "What is the {o} month?",
            "Which month is the {o}?",
            "What is the {o} month of the year?",
            "Name the {o} month.",
        )
        return Turn(ask(patterns, rng, o=ORDINALS[at]), f"{MONTHS[at]} is the {ORDINALS[at]} month.")
    month = rng.choice(MONTHS)
    patterns = (
        "How many days does {m} have?",
        "How many days are in {m}?",
        "How long is {m}?",
        "How many days has {m}?",
    )
    extra = ", and 29 in a leap year" if month == "February" else ""
    return Turn(ask(patterns, rng, m=month), f"{month} has {MONTH_DAYS[month]} days{extra}.")
