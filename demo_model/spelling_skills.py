"""Spelling words and repeating them."""

from __future__ import annotations

import random
import re

from demo_model import words
from demo_model.known import HOWTO, REFUSALS, SMALL_TALK, TERMS
from demo_model.phrasing import ask
from demo_model.stories import DETAILS, HEROES, PLOTS
from demo_model.turn import Turn

# Every word that the fixed texts contain.
VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {
            word.lower()
            for text in (
                *(t.answer + " " + (t.long or "") + " " + " ".join(t.names) for t in TERMS),
                *(f.answer + " " + " ".join(f.questions) for f in (*HOWTO, *SMALL_TALK)),
                *(" ".join((*r.patterns, *r.things)) for r in REFUSALS.values()),
                *PLOTS,
                *(" ".join(parts) for parts in DETAILS),
                " ".join((*words.SPELLING, *HEROES, *words.CAPITALS, *words.CAPITALS.values(), *words.NO_CAPITALS)),
            )
            for word in re.findall(r"[A-Za-z]{3,}", text)
        }
    )
)

SPELL = (
    "Spell the word {w}.",
    "Spell {w}.",
    "Spell {w}",
    "How do you spell {w}?",
    "Spell the word {w} please.",
    "Can you spell {w}?",
    "How is {w} spelled?",
    'Spell "{w}".',
    'Spell the word "{w}".',
    "Please spell {w}.",
    "Spell {w} for me.",
    "Can you spell the word {w}?",
    "How do I spell {w}?",
    "Which letters are in {w}?",
    "Spell: {w}",
    "Could you spell the word '{w}'?",
    "What is the spelling of {w}?",
    "How would you spell {w}?",
    "Spell out {w}.",
    "Spell out the word {w}.",
    "I want to spell {w}.",
    "How is the word {w} written?",
    "Spell it: {w}",
    "Letters of {w}?",
    "Help me spell {w}.",
    "Write {w} letter by letter.",
)
SPELL_NEXT = ("And {w}?", "Now {w}.", "What about {w}?", "And the word {w}?", "and {w}", "Now spell {w}.", "{w}?")
LETTERS = (
    "How many letters are in {w}?",
    "How many letters does {w} have?",
    "How many letters has the word {w}?",
    "Count the letters of {w}.",
    "How long is the word {w}?",
    "How many letters are in the word {w}?",
)


def _word(rng: random.Random) -> str:
    """Known words, and three kinds of unknown ones: every token has to be spelled out from what it is made of."""
    roll = rng.random()
    if roll < 0.3:
        return rng.choice(words.SPELLING)
    if roll < 0.36:
        return rng.choice(HEROES)
    if roll < 0.5:
        return rng.choice(VOCABULARY)
    if roll < 0.62:
        return words.pseudo_word(rng)
    if roll < 0.67:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7)))
    first, second = rng.choice(VOCABULARY), rng.choice(VOCABULARY)
    return (first[: rng.randint(1, len(first))] + second[rng.randint(0, len(second) - 1) :])[:16]


def spell_turn(rng: random.Random, patterns: tuple[str, ...] = SPELL) -> Turn:
    word = _word(rng)
    shown = word.capitalize() if rng.random() < 0.2 else word.upper() if rng.random() < 0.05 else word
    if patterns is SPELL and rng.random() < 0.2:
        return Turn(ask(LETTERS, rng, w=shown), f"{'-'.join(word)} has {len(word)} letters.", None)
    return Turn(ask(patterns, rng, w=shown), "-".join(word), lambda rng: spell_turn(rng, SPELL_NEXT))


ECHO = (
    "Repeat after me: {x}",
    "Say: {x}",
    'Say "{x}"',
    "Repeat: {x}",
    "Echo {x}",
    "Please repeat after me: {x}",
    "Write this down: {x}",
    "Copy this: {x}",
)


def echo_turn(rng: random.Random) -> Turn:
    vocabulary = (*words.SPELLING, *HEROES)
    picked = [
        rng.choice(vocabulary) if rng.random() < 0.8 else words.pseudo_word(rng) for _ in range(rng.randint(1, 8))
    ]
    text = " ".join(picked)
    return Turn(ask(ECHO, rng, 0.3, x=text), text, None)
