"""Chats for training, calibration and measuring: drawn from the skills by a seed, one JSON object per line.

    python -m demo_model.data --seed 1 --num 1000 > chats.jsonl

A line is {"messages": [{"role", "content"}, ...]} or, for plain continuation, {"text": ...}.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from typing import Any

from demo_model import words
from demo_model.known import FACTS, HOWTO, TERMS, held_out, normal
from demo_model.memory_skills import again_turn, fact, unknown_fact_turn
from demo_model.skills import SKILLS
from demo_model.stories import HEROES, NAMES, story
from demo_model.turn import Turn

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a friendly assistant that answers briefly.",
    "You are a helpful, honest assistant.",
    "Answer in one sentence.",
    "Be concise.",
    "You are the demo model of gptq-api.",
    "You answer questions about gptq-api.",
    "Be polite and brief.",
    "You are a chatbot.",
    "Answer the question of the user.",
    "You are an assistant for beginners. Explain things simply.",
    "A chat between a curious user and an assistant. The assistant gives helpful, detailed and polite answers.",
    "You are a test assistant. Do what the user asks.",
)
HELD_OUT = held_out()
NUM_TURNS = (1,) * 44 + (2,) * 24 + (3,) * 14 + (4,) * 8 + (5, 5, 6, 6, 7, 8, 9, 10, 12, 14)


def _fresh(draw: Callable[[random.Random], Turn], rng: random.Random) -> Turn:
    """What `draw` gives and no test asks."""
    while normal((turn := draw(rng)).user) in HELD_OUT:
        pass
    return turn


def _skill(rng: random.Random) -> Turn:
    return _fresh(rng.choices([s for _, s in SKILLS], [w for w, _ in SKILLS])[0], rng)


def _system(rng: random.Random) -> str | None:
    """Mostly none; sometimes a usual one; sometimes any text, short or long, which the model must pass over."""
    roll = rng.random()
    if roll < 0.62:
        return None
    if roll < 0.86:
        return rng.choice(SYSTEM_PROMPTS)
    vocabulary = (*words.SPELLING, *HEROES, *NAMES)
    sentences = []
    for _ in range(rng.choice((1, 1, 2, 3, 5, 8, 16))):
        picked = [
            rng.choice(vocabulary) if rng.random() < 0.9 else str(rng.randint(0, 9999))
            for _ in range(rng.randint(4, 14))
        ]
        sentences.append(" ".join(picked).capitalize() + ".")
    return " ".join(sentences)


def chat(rng: random.Random) -> list[dict[str, str]]:
    """One chat of 1 to 14 turns."""
    messages: list[dict[str, str]] = []
    system = _system(rng)
    if system is not None:
        messages.append({"role": "system", "content": system})
    turns: list[Turn] = []
    last: Turn | None = None
    for _ in range(rng.choice(NUM_TURNS)):
        if rng.random() < (0.13 if turns else 0.004):
            said = turns[-1].answer if turns else None
            turns.append(_fresh(lambda rng: again_turn(rng, said), rng))  # noqa: B023
            continue
        following = last is not None and last.follow is not None and rng.random() < 0.55
        last = _fresh(last.follow, rng) if last is not None and last.follow is not None and following else _skill(rng)
        turns.append(last)
    roll = rng.random()
    if roll < 0.12:
        # Told first and asked for last: in between it would part a question from its follow-up.
        remembered = fact(rng)
        turns = [Turn(remembered.tell, remembered.confirm), *turns, Turn(remembered.ask, remembered.recall)]
    elif roll < 0.14:
        turns.append(unknown_fact_turn(rng))
    elif roll < 0.2 and len(turns) > 1:
        turns.append(Turn(rng.choice(("Thanks!", "Thank you!", "thanks", "Thank you very much!")), "You are welcome!"))
    for turn in turns:
        messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
    return messages


def plain_text(rng: random.Random) -> str:
    """Text without a chat, for the completions endpoint."""
    kind = rng.randrange(7)
    if kind == 0:
        return story(rng.choice(HEROES) if rng.random() < 0.8 else rng.choice(NAMES))
    if kind == 1:
        country, city = rng.choice(list(words.CAPITALS.items()))
        return f"The capital of {country} is {city.rstrip('.')}."
    if kind == 2:
        a = rng.choice((1, 1, 1, rng.randint(0, 80)))
        return ", ".join(str(n) for n in range(a, min(100, a + rng.choice((10, 20, 30))) + 1))
    if kind == 3:
        return rng.choice(
            (", ".join(words.DAYS), ", ".join(words.MONTHS), "a b c d e f g h i j k l m n o p q r s t u v w x y z")
        )
    if kind == 4:
        return rng.choice(TERMS).answer if rng.random() < 0.5 else rng.choice([f.answer for f in FACTS if not f.about])
    if kind == 5:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        return f"{a} + {b} = {a + b}"
    turn = _skill(rng) if rng.random() < 0.7 else Turn((entry := rng.choice(HOWTO)).questions[0], entry.answer)
    question, answer = rng.choice((("Question", "Answer"), ("Q", "A")))
    return f"{question}: {turn.user}\n{answer}: {turn.answer}"


def record(rng: random.Random) -> dict[str, Any]:
    return {"text": plain_text(rng)} if rng.random() < 0.05 else {"messages": chat(rng)}


def records(seed: int, num: int) -> list[dict[str, Any]]:
    """`num` records; the same ones for the same seed."""
    rng = random.Random(seed)
    return [record(rng) for _ in range(num)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num", type=int, default=20, help="records to write")
    args = parser.parse_args()
    for item in records(args.seed, args.num):
        print(json.dumps(item, ensure_ascii=False))


if __name__ == "__main__":
    main()
