"""Asking for stories."""

from __future__ import annotations

import random

from demo_model import words
from demo_model.phrasing import ask
from demo_model.spelling_skills import VOCABULARY
from demo_model.stories import ADJECTIVES, HEROES, NAMES, article, story
from demo_model.turn import Turn

STORY = (
    "Tell me a story about {h}.",
    "Tell me a story about {h}.",
    "Tell me a three-sentence story about {h}.",
    "Tell a story about {h}.",
    "A story about {h}, please.",
    "Write a short story about {h}.",
    "Write a story about {h}.",
    "Tell me a short story about {h}.",
    "Please tell me a story about {h}.",
    "Can you tell me a story about {h}?",
    "I would like to hear a story about {h}.",
    "Make up a story about {h}.",
    "Tell me a bedtime story about {h}.",
    "story about {h}",
    "Give me a story about {h}.",
    "Tell me a story with three sentences about {h}.",
    "Do you know a story about {h}?",
    "Write three sentences about {h}.",
)
STORY_NEXT = (
    "Now about {h}.",
    "And one about {h}?",
    "And now a story about {h}.",
    "Another one about {h}.",
    "What about {h}?",
)
STORY_OTHER = (
    "Another one, please.",
    "Tell me another story.",
    "Another one!",
    "One more, please.",
    "Another story?",
    "More!",
)
STORY_PLAIN = (
    "Tell me a story.",
    "Tell me a story",
    "Tell a story.",
    "Can you tell me a story?",
    "Do you know a story?",
    "I want to hear a story.",
    "A story, please.",
    "Tell me a short story.",
    "Please tell me a bedtime story.",
    "Write a story.",
    "Make up a story.",
    "Tell me a three-sentence story.",
    "Write a short story.",
)
# Nobody asked for a hero: mostly the robot, so that the greedy answer is steady, sometimes another one.
PLAIN_HEROES = ("robot",) * 12 + ("fox", "owl", "dragon", "llama", "knight", "penguin", "lighthouse", "snowflake")


def _hero(rng: random.Random) -> tuple[str, str]:
    """(hero, the way it is asked for)"""
    roll = rng.random()
    if roll < 0.12:
        name = rng.choice(NAMES)
        return name, name
    noun = words.pseudo_word(rng) if roll < 0.22 else rng.choice(HEROES)
    if rng.random() < 0.25:
        adjective = rng.choice((*ADJECTIVES, *words.COLOURS)) if rng.random() < 0.6 else rng.choice(VOCABULARY)
        noun = f"{adjective} {noun}"
    how = rng.random()
    if how < 0.75:
        return noun, f"{article(noun)} {noun}"
    return noun, f"the {noun}" if how < 0.9 else noun


def story_turn(rng: random.Random, patterns: tuple[str, ...] = STORY) -> Turn:
    if patterns is STORY and rng.random() < 0.2:
        hero, shown = rng.choice(PLAIN_HEROES), ""
        user = ask(STORY_PLAIN, rng)
    else:
        hero, shown = _hero(rng)
        user = ask(patterns, rng, h=shown)

    def follow(rng: random.Random, variant: int = 1) -> Turn:
        if rng.random() < 0.5:
            return story_turn(rng, STORY_NEXT)
        return Turn(ask(STORY_OTHER, rng), story(hero, variant), lambda rng: follow(rng, variant + 1))

    return Turn(user, story(hero), follow)
