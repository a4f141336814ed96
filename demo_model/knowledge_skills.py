"""Questions about terms, usage, flags and the model itself: answers known by heart."""

from __future__ import annotations

import random

from demo_model.known import FLAGS, HOWTO, SMALL_TALK, TERMS, Fixed, Topic
from demo_model.phrasing import ask
from demo_model.turn import Turn

TERM_PATTERNS = (
    "What is {t}?",
    "What is {t}?",
    "What is {t}?",
    "What's {t}?",
    "Explain {t}.",
    "Explain {t} to me.",
    "Please explain {t}.",
    "Can you explain {t}?",
    "Could you explain {t} to me?",
    "What does {t} mean?",
    "What do you mean by {t}?",
    "Define {t}.",
    "Tell me about {t}.",
    "Tell me what {t} is.",
    "How does {t} work?",
    "I do not understand {t}.",
    "What is meant by {t}?",
    "Describe {t}.",
    "Do you know what {t} is?",
    "Do you know {t}?",
    "What do you know about {t}?",
    "I want to know what {t} is.",
    "What exactly is {t}?",
    "In one sentence, what is {t}?",
    "Explain {t} simply.",
    "Explain {t} like I am five.",
    "What is {t} good for?",
    "Why do I need {t}?",
    "What is the point of {t}?",
    "{t}?",
    "{t}",
    "Give me a short explanation of {t}.",
    "I don't get {t}.",
    "I don't understand what {t} is.",
    "I don't know what {t} means.",
    "I have no idea what {t} is.",
    "What are {t}?",
    "What does {t} do?",
    "Why is {t} useful?",
    "Why is {t} needed?",
    "How is {t} used?",
    "What is {t} used for?",
    "What is the idea behind {t}?",
    "What is the meaning of {t}?",
    "{t} meaning",
    "{t} explained",
    "Meaning of {t}?",
    "Could you clarify {t}?",
    "Teach me {t}.",
    "Someone mentioned {t}. What is it?",
    "I read about {t}. What is that?",
    "I keep hearing about {t}.",
    "Is {t} important?",
    "What can you tell me about {t}?",
    "How does {t} help?",
    "Why would I use {t}?",
    "What is so good about {t}?",
    "Tell me something about {t}.",
    "What do people mean when they say {t}?",
    "What is this {t} thing?",
    "Help me understand {t}",
    "What is {t}, and why does it matter?",
)
LONG_PATTERNS = (
    "Explain {t} in detail.",
    "Explain in detail how {t} works.",
    "Give me a long explanation of {t}.",
    "Tell me everything about {t}.",
    "Explain {t} at length.",
    "Please explain {t} in more detail.",
    "Describe {t} in detail.",
    "How does {t} work in detail?",
)
MORE = (
    "Tell me more.",
    "More, please.",
    "Can you say more?",
    "Go on.",
    "In more detail, please.",
    "More details?",
    "Explain more.",
)
NO_MORE = "That is all I know about it."
ANOTHER = ("And {t}?", "What about {t}?", "And what is {t}?", "And {t}", "How about {t}?", "Ok, and {t}?")


def _topic(rng: random.Random, topic: Topic, patterns: tuple[str, ...]) -> Turn:
    name = rng.choice(topic.names) if rng.random() < 0.6 else topic.names[0]
    if patterns is TERM_PATTERNS and rng.random() < (0.2 if topic.long else 0.05):
        return Turn(ask(LONG_PATTERNS, rng, t=name), topic.long or topic.answer, None)

    def follow(rng: random.Random) -> Turn:
        if rng.random() < 0.5:
            return Turn(ask(MORE, rng), topic.long or NO_MORE, None)
        return _topic(rng, rng.choice(TERMS), ANOTHER)

    return Turn(ask(patterns, rng, t=name), topic.answer, follow)


def topic_turn(rng: random.Random) -> Turn:
    # The project and GPTQ are what newcomers ask first.
    topic = rng.choice(TERMS[:12]) if rng.random() < 0.4 else rng.choice(TERMS)
    return _topic(rng, topic, TERM_PATTERNS)


def _fixed(rng: random.Random, entries: tuple[Fixed, ...]) -> Turn:
    entry = rng.choice(entries)
    return Turn(ask(entry.questions, rng), entry.answer, None)


def howto_turn(rng: random.Random) -> Turn:
    return _fixed(rng, HOWTO)


def talk_turn(rng: random.Random) -> Turn:
    return _fixed(rng, SMALL_TALK)


FLAG_PATTERNS = (
    "What does {f} do?",
    "What is {f}?",
    "What is {f} for?",
    "Explain {f}.",
    "What does the flag {f} do?",
    "What is the {f} flag?",
    "When do I need {f}?",
    "How do I use {f}?",
    "What does {f} mean?",
    "Tell me about {f}.",
    "{f}?",
    "{f}",
    "And {f}?",
    "What about {f}?",
    "Explain the option {f}.",
    "What is the default of {f}?",
)


def flag_turn(rng: random.Random) -> Turn:
    flag = rng.choice(list(FLAGS))
    shown = (
        flag if rng.random() < 0.75 else flag.strip("-") if rng.random() < 0.5 else flag.strip("-").replace("-", "_")
    )
    if shown.count("-") + shown.count("_") == 0 or flag == "--chat-template":
        shown = flag  # the bare words mean too many things
    return Turn(ask(FLAG_PATTERNS, rng, f=shown), FLAGS[flag], flag_turn)
