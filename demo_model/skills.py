"""The skills: each draws one question with its only right answer, and what may follow it in a chat."""

from __future__ import annotations

import random
from collections.abc import Callable

from demo_model import known, words
from demo_model.calendar_skills import calendar_turn
from demo_model.knowledge_skills import flag_turn, howto_turn, talk_turn, topic_turn
from demo_model.newcomer_skills import newcomer_turn
from demo_model.number_skills import count_turn, number_turn, sum_turn
from demo_model.phrasing import ask
from demo_model.spelling_skills import echo_turn, spell_turn
from demo_model.story_skills import story_turn
from demo_model.turn import Turn
from demo_model.world_skills import capital_turn, kids_turn

LANGUAGES = (
    "Python",
    "C",
    "C++",
    "Java",
    "JavaScript",
    "Rust",
    "Go",
    "Bash",
    "HTML",
    "PHP",
    "Ruby",
    "R",
    "Kotlin",
    "Swift",
)

_MORE_OFTEN = ("general", "general", "general", "medical", "medical", "legal", "finance", "harm", "harm")


def refusal_turn(rng: random.Random) -> Turn:
    refusal = known.REFUSALS[rng.choice((*known.REFUSALS, *_MORE_OFTEN))]
    x, y = (rng.choice(refusal.things), rng.choice(refusal.things)) if refusal.things else ("", "")
    if refusal.answer == known.GENERAL and rng.random() < 0.2:
        x = words.pseudo_word(rng) if rng.random() < 0.7 else f"{words.pseudo_word(rng)} {words.pseudo_word(rng)}"
    if rng.random() < 0.2:
        x = x.lower()
    language = rng.choice(LANGUAGES)
    if rng.random() < 0.4:
        language = language.lower()
    task, noun = rng.choice(known.CODE_TASKS), rng.choice(known.CODE_NOUNS)
    slots = {"x": x, "y": y, "l": language, "v": task, "n": noun}
    slots |= {name: rng.choice(things) for name, things in refusal.slots.items()}
    return Turn(ask(refusal.patterns, rng, **slots), refusal.answer, None)


SKILLS: tuple[tuple[float, Callable[[random.Random], Turn]], ...] = (
    (16, topic_turn),
    (10, howto_turn),
    (5, flag_turn),
    (46, newcomer_turn),
    (13, talk_turn),
    (9, count_turn),
    (20, sum_turn),
    (3, number_turn),
    (12, spell_turn),
    (8, story_turn),
    (5, capital_turn),
    (5, calendar_turn),
    (2, kids_turn),
    (2, echo_turn),
    (28, refusal_turn),
)
