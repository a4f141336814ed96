"""The skills: each draws one question with its only right answer, and what may follow it in a chat."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from tools.demo import howto, refusals, topics, words
from tools.demo.calendar_skills import calendar_turn
from tools.demo.number_skills import count_turn, number_turn, sum_turn
from tools.demo.phrasing import ask
from tools.demo.stories import ADJECTIVES, DETAILS, HEROES, NAMES, PLOTS, article, story
from tools.demo.turn import Turn

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


def _topic(rng: random.Random, topic: topics.Topic, patterns: tuple[str, ...]) -> Turn:
    name = rng.choice(topic.names) if rng.random() < 0.6 else topic.names[0]
    if patterns is TERM_PATTERNS and rng.random() < (0.2 if topic.long else 0.05):
        return Turn(ask(LONG_PATTERNS, rng, t=name), topic.long or topic.answer, None)

    def follow(rng: random.Random) -> Turn:
        if rng.random() < 0.5:
            return Turn(ask(MORE, rng), topic.long or NO_MORE, None)
        return _topic(rng, rng.choice(topics.TERMS), ANOTHER)

    return Turn(ask(patterns, rng, t=name), topic.answer, follow)


def topic_turn(rng: random.Random) -> Turn:
    # The project and GPTQ are what newcomers ask first.
    topic = rng.choice(topics.TERMS[:12]) if rng.random() < 0.4 else rng.choice(topics.TERMS)
    return _topic(rng, topic, TERM_PATTERNS)


def _fixed(rng: random.Random, entries: tuple[howto.Fixed, ...]) -> Turn:
    entry = rng.choice(entries)
    return Turn(ask(entry.questions, rng), entry.answer, None)


def howto_turn(rng: random.Random) -> Turn:
    return _fixed(rng, howto.HOWTO)


def talk_turn(rng: random.Random) -> Turn:
    return _fixed(rng, howto.SMALL_TALK)


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
    flag = rng.choice(list(howto.FLAGS))
    shown = (
        flag if rng.random() < 0.75 else flag.strip("-") if rng.random() < 0.5 else flag.strip("-").replace("-", "_")
    )
    if shown.count("-") + shown.count("_") == 0 or flag == "--chat-template":
        shown = flag  # the bare words mean too many things
    return Turn(ask(FLAG_PATTERNS, rng, f=shown), howto.FLAGS[flag], flag_turn)


# Every word that the fixed texts contain.
VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {
            word.lower()
            for text in (
                *(t.answer + " " + (t.long or "") + " " + " ".join(t.names) for t in topics.TERMS),
                *(f.answer + " " + " ".join(f.questions) for f in (*howto.HOWTO, *howto.SMALL_TALK)),
                *(" ".join((*patterns, *things)) for _, patterns, things in refusals.REFUSALS.values()),
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
        return Turn(ask(patterns, rng, c=country), refusals.NO_CAPITAL, follow)
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
    patterns = (
        "Say hello in {l}.",
        "How do you say hello in {l}?",
        "What is hello in {l}?",
        "Greet me in {l}.",
        "hello in {l}",
    )
    return Turn(ask(patterns, rng, l=language), words.HELLO[language], None)


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
