"""Capitals, opposites, animal sounds and greetings."""

from __future__ import annotations

import random

from demo_model import words
from demo_model.known import NO_CAPITAL
from demo_model.phrasing import ask
from demo_model.stories import article
from demo_model.turn import Turn

CAPITAL = (
    "What is the capital of {c}?",
    "What is the capital of {c}?",
    "What's the capital of {c}?",
    "Which city is the capital of {c}?",
    "Tell me the capital of {c}.",
    "Name the capital of {c}.",
    "Do you know the capital of {c}?",
    "capital of {c}",
    "The capital of {c}?",
    "What is the capital city of {c}?",
)
CAPITAL_NEXT = ("And of {c}?", "And {c}?", "What about {c}?", "And the capital of {c}?", "How about {c}?", "and of {c}")


def capital_turn(rng: random.Random, patterns: tuple[str, ...] = CAPITAL) -> Turn:
    def follow(rng: random.Random) -> Turn:
        return capital_turn(rng, CAPITAL_NEXT)

    if rng.random() < 0.12:
        country = rng.choice(words.NO_CAPITALS) if rng.random() < 0.7 else words.pseudo_word(rng).capitalize()
        return Turn(ask(patterns, rng, c=country), NO_CAPITAL, follow)
    country = rng.choice(list(words.CAPITALS))
    if rng.random() < 0.1:
        asked = rng.choice(list(words.CAPITAL_ALIASES))
        country = words.CAPITAL_ALIASES[asked]
    else:
        asked = country
    if rng.random() < 0.15:
        asked = asked.lower()
    answer = f"The capital of {country} is {words.CAPITALS[country]}"
    return Turn(ask(patterns, rng, c=asked), answer.rstrip(".") + ".", follow)


def kids_turn(rng: random.Random) -> Turn:
    """Opposites, animal sounds, greetings in other languages."""
    kind = rng.randrange(3)
    if kind == 0:
        word = rng.choice(list(words.OPPOSITES))
        patterns = (
            "What is the opposite of {w}?",
            "Opposite of {w}?",
            "Tell me the opposite of {w}.",
            "What's the contrary of {w}?",
        )
        return Turn(ask(patterns, rng, w=word), f"The opposite of {word} is {words.OPPOSITES[word]}.", None)
    if kind == 1:
        animal = rng.choice(list(words.SOUNDS))
        a = f"{article(animal)} {animal}"
        patterns = ("What does {a} say?", "What sound does {a} make?", "Which sound does {a} make?", "How does {a} go?")
        return Turn(ask(patterns, rng, a=a), f"{a.capitalize()} says {words.SOUNDS[animal]}.", None)
    language = rng.choice(list(words.HELLO))
    greetings = (
        "Say hello in {l}.",
        "How do you say hello in {l}?",
        "What is hello in {l}?",
        "Greet me in {l}.",
        "hello in {l}",
    )
    return Turn(ask(greetings, rng, l=language), words.HELLO[language], None)
