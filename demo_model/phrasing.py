"""How people write: greetings around a question, lower case, missing marks, typing errors.

Patterns carry slots in braces; only the text around the slots is ever disturbed, so that a number to add or a word to
spell stays what it is.
"""

from __future__ import annotations

import random
import re

PREFIXES = (
    "Hi, ",
    "Hello! ",
    "Hello, ",
    "Hey, ",
    "Please ",
    "Please, ",
    "So, ",
    "Ok, ",
    "Okay, ",
    "Quick question: ",
    "I have a question. ",
    "Good morning! ",
    "Now ",
    "And ",
    "Hi there! ",
    "One more question: ",
    "Sorry, ",
    "Well, ",
    "Tell me: ",
    "Thanks! ",
    "Great! ",
    "Just wondering, ",
    "By the way, ",
    "Sorry to bother you, ",
    "I am new to this. ",
    "In simple words: ",
    "Briefly: ",
    "Next question: ",
    "My friend asks: ",
    "Hmm, ",
    "Alright, ",
    "Hey hey, ",
    "Dear assistant, ",
    "Quick one: ",
    "I was wondering, ",
    "Newbie question: ",
    "Stupid question: ",
    "My boss wants to know: ",
    "Before I install it: ",
    "Just to be sure: ",
    "And one more thing: ",
    "Another question: ",
    "Excuse me, ",
    "Oh, and ",
    "But ",
    "Wait, ",
    "Say, ",
    "Question: ",
    "Hello again, ",
)
SUFFIXES = (
    " please",
    ", please",
    " Thanks!",
    " Thank you!",
    " thx",
    " Please answer.",
    " for me",
    " I am new here.",
    " exactly",
    " then",
    " now",
    " by the way",
)
REQUESTS = (
    "Can you tell me: ",
    "Could you tell me ",
    "Do you know ",
    "I would like to know: ",
    "I want to know ",
    "Please tell me ",
    "I wonder ",
    "Any idea ",
    "Just tell me ",
    "Remind me, ",
    "I forgot, ",
    "Would you tell me ",
)
IT = (
    *("it", "it", "this", "gptq-api", "gptq-api", "this server", "the server", "this thing", "this program"),
    *("your server", "this software", "the software", "your software", "this tool", "this project"),
)
"""what people call the project where a pattern says <it>"""
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"(\{\w+\})")


def expand(pattern: str, rng: random.Random) -> str:
    """`pattern` with one of the choices of every [a|b|], the inner ones first, and a word for every <it>."""
    while "[" in pattern:
        pattern = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), pattern)
    pattern = re.sub("<it>", lambda _: rng.choice(IT), pattern)
    return re.sub(r" +([?.!,]|$)", r"\1", re.sub(r"  +", " ", pattern)).strip()


def _typo(text: str, rng: random.Random) -> str:
    letters = [i for i in range(1, len(text) - 1) if text[i - 1 : i + 2].isalpha()]
    if not letters:
        return text
    i = rng.choice(letters)
    kind = rng.randrange(3)
    if kind == 0:
        return text[:i] + text[i + 1 :]
    if kind == 1:
        return text[:i] + text[i] + text[i:]
    return text[: i - 1] + text[i] + text[i - 1] + text[i + 1 :]


def _lower_first(text: str) -> str:
    keep = text.startswith(("I ", "I'", "GPTQ", "SSE", "KV", "OpenAI", "LLaMA", "{"))
    return text if keep else text[0].lower() + text[1:]


_SMALL_WORDS = re.compile(
    "an?|the|is|are|do|does|i|to|of|it|for|my|this|that|with|on|in|your?|please|can", re.IGNORECASE
)


def _without_a_word(text: str, rng: random.Random) -> str:
    """`text` without one of its small words, as in telegrams; as it is where it has none or few words."""
    parts = text.split(" ")
    at = [i for i, part in enumerate(parts) if _SMALL_WORDS.fullmatch(part)]
    if len(parts) < 5 or not at:
        return text
    del parts[rng.choice(at)]
    return " ".join(parts)


def disturb(pattern: str, rng: random.Random, strength: float = 1.0) -> str:
    """`pattern` as somebody in a hurry may type it. `strength` 0 leaves it alone."""
    if rng.random() < 0.35:
        return pattern
    if len(pattern) > 12 and rng.random() < 0.22 * strength:
        if pattern.endswith("?") and rng.random() < 0.4:
            pattern = rng.choice(REQUESTS) + _lower_first(pattern)
        else:
            pattern = rng.choice(PREFIXES) + _lower_first(pattern)
    if len(pattern) > 8 and rng.random() < 0.1 * strength:
        bare = pattern.rstrip(".!?")
        suffix = rng.choice(SUFFIXES)
        pattern = bare + suffix + (pattern[len(bare) :] if suffix[-1].isalpha() else "")
    if rng.random() < 0.3:
        pattern = pattern.rstrip(".!?") or pattern
    if rng.random() < 0.08 * strength:
        pattern = _without_a_word(pattern, rng)
    if rng.random() < 0.45:
        pattern = "".join(part if part.startswith("{") else part.lower() for part in _SLOT.split(pattern))
    if rng.random() < 0.15:
        pattern = pattern.replace("hat is", "hat's")
    if rng.random() < 0.3:
        pattern = pattern.replace("n't", "nt").replace("hat's", "hats").replace("I'm", "Im")
    if rng.random() < 0.15 * strength:
        parts = _SLOT.split(pattern)
        i = rng.randrange((len(parts) + 1) // 2) * 2
        parts[i] = _typo(parts[i], rng)
        pattern = "".join(parts)
    return pattern


def ask(patterns: tuple[str, ...], rng: random.Random, strength: float = 1.0, **slots: object) -> str:
    """One of `patterns`, its choices made, disturbed, with its slots filled."""
    text = disturb(expand(rng.choice(patterns), rng), rng, strength)
    return _SLOT.sub(lambda match: str(slots[match[1][1:-1]]), text).strip()
