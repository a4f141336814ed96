"""What newcomers ask: platforms, GPUs, clients, models, formats, memory, privacy, errors.

A fact has one answer. Its questions are sentences of its own, and its nouns, platforms and tasks put into sentences
that all facts share: "Is {noun} supported?", "Does it run on {platform}?", "How do I {task}?". So a fact is asked for
in hundreds of ways, and the model has seen every way with many facts.
"""

from __future__ import annotations

import random

from demo_model import words
from demo_model.known import ABOUT, CONTEXTS, FACTS, MEMORY, NAMES_OF, Fact
from demo_model.phrasing import ask, expand
from demo_model.turn import Turn

_SHARES = {"questions": 4, "nouns": 3, "platforms": 4, "tasks": 4}
"""how often a fact is asked for in each of the ways it has"""

MODEL_GB = {1: 1, 3: 2, 7: 4, 8: 6, 13: 8, 14: 10, 30: 17, 32: 19, 33: 18, 34: 19, 65: 35, 70: 40, 72: 42}
"""billions of weights: about how many GB they take in 4 bits, embeddings in 16 bits among them"""
CARD_GB = {4: 3, 6: 7, 8: 8, 10: 8, 11: 8, 12: 13, 16: 14, 20: 14, 24: 34, 32: 34, 40: 34, 48: 70, 64: 70, 80: 70}
"""GB of memory: billions of weights that fit in 4 bits with room for the KV cache"""


def _text(fact: Fact, rng: random.Random) -> str:
    """A question that asks for `fact`, undisturbed."""
    kinds = [kind for kind in _SHARES if getattr(fact, kind)]
    kind = rng.choices(kinds, [_SHARES[k] for k in kinds])[0]
    thing = expand(rng.choice(getattr(fact, kind)), rng)
    return thing if kind == "questions" else expand(rng.choice(ABOUT[kind]), rng).replace("{t}", thing)


def _about(fact: Fact, rng: random.Random) -> Turn:
    """A fact about programs or models that are told by their names, which the answer has as the user wrote them."""
    assert fact.about is not None
    if fact.about == "unknown":
        name = words.pseudo_word(rng)
        name = name.capitalize() if rng.random() < 0.6 else name
    else:
        name = rng.choice(NAMES_OF[fact.about])
        name = name.lower() if rng.random() < 0.35 else name
    patterns = ABOUT["models" if fact.about in ("family", "nofamily") else "tools"]
    return Turn(ask(patterns, rng, t=name), fact.answer.replace("{name}", name))


def memory_turn(rng: random.Random) -> Turn:
    """How much memory a model takes, and which model a memory holds."""
    g = rng.choice(list(CARD_GB))
    if rng.random() < 0.6:
        n = rng.choice(list(MODEL_GB))
        answer = f"In 4 bits a {n}B model needs about {MODEL_GB[n]} GB, and the KV cache comes on top."
        return Turn(ask(MEMORY["needs"], rng, n=n, g=g), answer, memory_turn)
    answer = f"In 4 bits about {CARD_GB[g]}B fit into {g} GB, with room for the KV cache."
    return Turn(ask(MEMORY["fits"], rng, g=g), answer, memory_turn)


def newcomer_turn(rng: random.Random) -> Turn:
    if rng.random() < 0.03:
        return memory_turn(rng)
    fact = rng.choice(FACTS)
    if fact.about is not None:
        return _about(fact, rng)
    text = _text(fact, rng)
    if rng.random() < 0.12 and len(text) > 12:
        text = rng.choice(CONTEXTS) + (text[0].lower() + text[1:] if text[:2].istitle() else text)
    return Turn(ask((text,), rng), fact.answer)
