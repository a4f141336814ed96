"""The skills: each draws one question with its only right answer, and what may follow it in a chat."""

from __future__ import annotations

import random
from collections.abc import Callable

from tools.demo import refusals, words
from tools.demo.calendar_skills import calendar_turn
from tools.demo.knowledge_skills import flag_turn, howto_turn, talk_turn, topic_turn
from tools.demo.number_skills import count_turn, number_turn, sum_turn
from tools.demo.phrasing import ask
from tools.demo.spelling_skills import echo_turn, spell_turn
from tools.demo.story_skills import story_turn
from tools.demo.turn import Turn
from tools.demo.world_skills import capital_turn, kids_turn

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


def refusal_turn(rng: random.Random) -> Turn:
    answer, patterns, things = refusals.REFUSALS[rng.choice((*refusals.REFUSALS, "general", "general"))]
    x, y = (rng.choice(things), rng.choice(things)) if things else ("", "")
    if answer is refusals.GENERAL and rng.random() < 0.2:
        x = words.pseudo_word(rng) if rng.random() < 0.7 else f"{words.pseudo_word(rng)} {words.pseudo_word(rng)}"
    if rng.random() < 0.2:
        x = x.lower()
    language = rng.choice(LANGUAGES)
    if rng.random() < 0.4:
        language = language.lower()
    task, noun = rng.choice(refusals.CODE_TASKS), rng.choice(refusals.CODE_NOUNS)
    return Turn(ask(patterns, rng, x=x, y=y, l=language, v=task, n=noun), answer, None)


SKILLS: tuple[tuple[float, Callable[[random.Random], Turn]], ...] = (
    (16, topic_turn),
    (10, howto_turn),
    (5, flag_turn),
    (11, talk_turn),
    (9, count_turn),
    (12, sum_turn),
    (3, number_turn),
    (12, spell_turn),
    (8, story_turn),
    (5, capital_turn),
    (5, calendar_turn),
    (2, kids_turn),
    (2, echo_turn),
    (12, refusal_turn),
)
