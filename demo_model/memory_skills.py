"""What the user tells and asks for again, maybe many turns later."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from demo_model import words
from demo_model.known import AGAIN, SHORTER
from demo_model.phrasing import ask
from demo_model.stories import HEROES, NAMES
from demo_model.turn import Turn


@dataclass(frozen=True)
class Fact:
    """Something the user tells and asks for again, maybe many turns later."""

    tell: str
    confirm: str
    ask: str
    recall: str


def fact(rng: random.Random) -> Fact:
    kind = rng.randrange(3)
    if kind == 0:
        name = rng.choice(NAMES) if rng.random() < 0.7 else words.pseudo_word(rng).capitalize()
        tell = ask(
            ("My name is {n}.", "I am {n}.", "Hi, my name is {n}.", "Hello, I am {n}.", "Call me {n}.", "I'm {n}."),
            rng,
            0.3,
            n=name,
        )
        again = ask(
            ("What is my name?", "What's my name?", "Who am I?", "Do you remember my name?", "Tell me my name."),
            rng,
            0.5,
        )
        return Fact(tell, f"Nice to meet you, {name}!", again, f"Your name is {name}.")
    if kind == 1:
        number = rng.randint(10, 9999)
        tell = ask(
            (
                "Remember the number {n}.",
                "Please remember the number {n}.",
                "My secret number is {n}.",
                "Keep in mind: {n}.",
            ),
            rng,
            0.3,
            n=number,
        )
        again = ask(
            (
                "Which number did I tell you?",
                "What was the number?",
                "What number should you remember?",
                "What is my secret number?",
            ),
            rng,
            0.5,
        )
        return Fact(tell, f"I will remember the number {number}.", again, f"You told me the number {number}.")
    what, choices = rng.choice((("colour", words.COLOURS), ("food", words.FOODS), ("animal", HEROES[:60])))
    shown = "color" if what == "colour" and rng.random() < 0.4 else what
    thing = rng.choice(choices)
    tell = ask(
        ("My favourite {w} is {t}.", "My favorite {w} is {t}.", "The {w} that I like best is {t}."),
        rng,
        0.3,
        w=shown,
        t=thing,
    )
    again = ask(
        ("What is my favourite {w}?", "What is my favorite {w}?", "Which {w} do I like best?"), rng, 0.5, w=shown
    )
    return Fact(
        tell, f"I will remember that your favourite {what} is {thing}.", again, f"Your favourite {what} is {thing}."
    )


UNKNOWN_FACTS = (
    (("What is my name?", "Who am I?", "Do you know my name?"), "You have not told me your name."),
    (
        ("Which number did I tell you?", "What is my secret number?", "What was the number?"),
        "You have not told me a number.",
    ),
)


def unknown_fact_turn(rng: random.Random) -> Turn:
    patterns, answer = rng.choice(UNKNOWN_FACTS)
    return Turn(ask(patterns, rng), answer, None)


NO_SHORTER = "That is as short as I can say it."
NOTHING_SAID = "I have not said anything yet."


def again_turn(rng: random.Random, last: str | None) -> Turn:
    """Asks for the last answer again, or for its first sentence; `last` is None where there was none."""
    if rng.random() < 0.62 or last is None:
        return Turn(ask(AGAIN, rng, 0.6), NOTHING_SAID if last is None else last)
    first = re.match(r".*?[.!?](?= [A-Z])", last)
    return Turn(ask(SHORTER, rng, 0.6), first[0] if first else NO_SHORTER)
