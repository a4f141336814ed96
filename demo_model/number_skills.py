"""Counting, sums and comparing."""

from __future__ import annotations

import random

from demo_model.known import BIG_COUNT, BIG_SUM, BIG_TIMES, NO_DIVISION
from demo_model.phrasing import ask
from demo_model.turn import Turn
from demo_model.words import NUMBER_WORDS

COUNT_TO = (
    "Count to {n}.",
    "Count to {n}.",
    "Count to {n}",
    "Count from 1 to {n}.",
    "Please count to {n}.",
    "Can you count to {n}?",
    "Count up to {n}.",
    "Count to {n} for me.",
    "List the numbers from 1 to {n}.",
    "Write the numbers from 1 to {n}.",
    "Count from one to {n}.",
    "Could you count to {n}?",
)
COUNT_FROM = (
    "Count from {a} to {b}.",
    "Count from {a} to {b}",
    "Please count from {a} to {b}.",
    "Can you count from {a} to {b}?",
    "List the numbers from {a} to {b}.",
    "Count {a} to {b}.",
    "Write the numbers from {a} to {b}.",
    "Count up from {a} to {b}.",
)
COUNT_BACK = (
    "Count backwards from {n}.",
    "Count down from {n}.",
    "Count backwards from {n} to 1.",
    "Count down from {n} to 1.",
    "Count back from {n}.",
    "Do a countdown from {n}.",
    "Can you count backwards from {n}?",
    "Count from {n} down to 1.",
    "Countdown from {n}",
)
COUNT_BY = (
    "Count to {n} in steps of {s}.",
    "Count to {n} by {s}s.",
    "Count by {s}s to {n}.",
    "Count in {s}s up to {n}.",
)
COUNT_MORE = ("Go on.", "Continue.", "Keep going.", "And then?", "What comes next?", "Carry on.", "More.", "Count on.")
COUNT_REVERSE = (
    "And backwards?",
    "Now backwards.",
    "And now backwards, please.",
    "The other way round?",
    "Now count back.",
)


def _join(numbers: range) -> str:
    return ", ".join(str(n) for n in numbers)


def _counted(user: str, numbers: range) -> Turn:
    def follow(rng: random.Random) -> Turn:
        step = numbers.step
        if rng.random() < 0.4 or len(numbers) < 2 or step < 0 or numbers[-1] + 5 * step > 100:
            back = numbers[::-1]
            return Turn(ask(COUNT_REVERSE, rng), _join(back), None)
        return _counted(ask(COUNT_MORE, rng), range(numbers[-1] + step, numbers[-1] + 5 * step + 1, step))

    return Turn(user, _join(numbers), follow if len(numbers) <= 20 else None)


def count_turn(rng: random.Random) -> Turn:
    roll = rng.random()
    if roll < 0.42:
        pick = rng.random()
        n = (
            rng.randint(2, 20)
            if pick < 0.72
            else rng.choice((25, 30, 40, 50, 100, 100))
            if pick < 0.86
            else rng.randint(21, 100)
        )
        shown = NUMBER_WORDS[n] if n <= 20 and rng.random() < 0.15 else str(n)
        return _counted(ask(COUNT_TO, rng, n=shown), range(1, n + 1))
    if roll < 0.68:
        a = rng.randint(0, 95)
        b = min(100, a + rng.choice((2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10, 12, 15, 20, 25)))
        return _counted(ask(COUNT_FROM, rng, a=a, b=b), range(a, b + 1))
    if roll < 0.86:
        n = rng.randint(2, 20) if rng.random() < 0.85 else rng.randint(21, 40)
        return _counted(ask(COUNT_BACK, rng, n=n), range(n, 0, -1))
    if roll < 0.94:
        step = rng.choice((2, 2, 5, 10, 10, 3))
        n = step * rng.randint(3, min(100 // step, 15))
        return _counted(ask(COUNT_BY, rng, n=n, s=step), range(step, n + 1, step))
    return Turn(
        ask(COUNT_TO, rng, n=rng.choice((rng.randint(101, 999), 1000, 10000, rng.randint(1000, 10**6)))), BIG_COUNT
    )


ADD = (
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} = ?",
    "{a}+{b}=",
    "Add {a} and {b}.",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "Calculate {a} + {b}.",
    "Compute {a} + {b}",
    "What is the sum of {a} and {b}?",
    "{a} plus {b}?",
    "What's {a}+{b}?",
    "Can you add {a} and {b}?",
    "What do you get when you add {a} and {b}?",
    "If I have {a} apples and get {b} more, how many do I have?",
    "Solve {a} + {b}.",
)
SUBTRACT = (
    "What is {a} - {b}?",
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "{a} - {b}",
    "{a}-{b}",
    "{a} - {b} = ?",
    "{a}-{b}=",
    "Subtract {b} from {a}.",
    "How much is {a} - {b}?",
    "How much is {a} minus {b}?",
    "Calculate {a} - {b}.",
    "Compute {a} - {b}",
    "{a} minus {b}?",
    "What's {a}-{b}?",
    "Take {b} away from {a}.",
    "What is left when I take {b} from {a}?",
    "If I have {a} apples and eat {b}, how many are left?",
    "Solve {a} - {b}.",
)
TIMES = (
    "What is {a} * {b}?",
    "What is {a} times {b}?",
    "{a} * {b}",
    "{a}*{b}",
    "{a} x {b}",
    "Multiply {a} by {b}.",
    "Multiply {a} and {b}.",
    "How much is {a} times {b}?",
    "What is {a} x {b}?",
    "{a} times {b}?",
    "Calculate {a} * {b}.",
    "[What is|What's|Compute|How much is|Solve|So what is|And what is] {a} [times|*|x|×|multiplied by] {b}?",
    "Please multiply {a} [and|by] {b}[.|]",
    "{a} [*|x|×|times|multiplied by] {b}[?| = ?| =|]",
    "{a}[*|x|×]{b}[?|=?|=|]",
    "What's {a}[*|x|×]{b}?",
    "What is {a}[*|x|×]{b}[?|]",
    "The product of {a} and {b}?",
    "Can you multiply {a} by {b}?",
    "Do you know {a} times {b}?",
)
SQUARE = (
    "What is {a} squared?",
    "{a} squared",
    "What's the square of {a}?",
    "Square {a}.",
    "{a} to the power of 2?",
    "{a}^2",
)
TWICE = ("What is twice {a}?", "Double {a}.", "What is double {a}?", "What is the double of {a}?", "twice {a}")
DIVIDE = (
    "What is {a} / {b}?",
    "What is {a} divided by {b}?",
    "Divide {a} by {b}.",
    "{a} / {b}",
    "What is the square root of {a}?",
    "What is {a} percent of {b}?",
    "What is {a} to the power of {b}?",
    "What is {a}.{b} + {b}?",
    "Solve x + {a} = {b}.",
    "[What is|What's|How much is|Calculate|Compute|] {a} [/|divided by|÷|over|:] {b}[?|]",
    "[What is|What's|How much is|Calculate|] {a} [+|plus] {b} [+|plus|-|minus] {c}[?|]",
    "[What is|What's|How much is|Calculate|] {a} [*|times|x] {b} [+|plus|-|*|times] {c}[?|]",
    "[What is|What's|Calculate|] ({a} [+|-|*] {b}) [*|/|+] {c}[?|]",
    "[What is|What's|] [half|a third|a quarter] of {a}?",
    "[What is|What's|How much is|] {b}[%| percent] of {a}?",
    "[What is|What's|] {a} [to the power of|modulo|mod|^] {b}?",
    "What is the [average|mean|ratio] of {a} and {b}?",
    "Is {a} a prime number?",
    "What is the [square root|cube root|logarithm|factorial] of {a}?",
    "What is {a}!?",
    "Convert {a} [miles to km|dollars to euros|feet to metres|pounds to kilos].",
    "What is -{a} + {b}?",
)
MAX_FACTOR = 20
"""the times tables go up to it"""
TIMES_NEXT = ("And times {b}?", "Times {b}?", "Now multiply by {b}.", "times {b}", "Multiply that by {b}.")
PLUS_NEXT = ("And plus {b}?", "Plus {b}?", "And {b} more?", "Now add {b}.", "Add {b}.", "plus {b}", "And + {b}?")
MINUS_NEXT = (
    "And minus {b}?",
    "Minus {b}?",
    "Now subtract {b}.",
    "Subtract {b}.",
    "minus {b}",
    "And - {b}?",
    "Take away {b}.",
)


def _operands(rng: random.Random) -> tuple[int, int]:
    if rng.random() < 0.5:
        return rng.randint(0, 20), rng.randint(0, 20)
    return rng.randint(0, 99), rng.randint(0, 99) if rng.random() < 0.6 else rng.randint(0, 9)


def _shown(n: int, rng: random.Random, as_word: bool) -> str:
    return NUMBER_WORDS[n] if as_word and n <= 20 else str(n)


def _sum(a: int, b: int, sign: str, user: str) -> Turn:
    result = a + b if sign == "+" else a - b if sign == "-" else a * b

    def follow(rng: random.Random) -> Turn:
        if result <= MAX_FACTOR and rng.random() < 0.15:
            b = rng.randint(0, 10)
            return _sum(result, b, "*", ask(TIMES_NEXT, rng, b=b))
        if rng.random() < 0.5:
            b = rng.randint(0, min(20, 99))
            return _sum(result, b, "+", ask(PLUS_NEXT, rng, b=b))
        b = rng.randint(0, min(20, result))
        return _sum(result, b, "-", ask(MINUS_NEXT, rng, b=b))

    return Turn(user, f"{a} {sign} {b} = {result}.", follow if 0 <= result <= 99 else None)


def _small(rng: random.Random) -> int:
    return rng.randint(0, 10) if rng.random() < 0.4 else rng.randint(0, MAX_FACTOR)


def sum_turn(rng: random.Random) -> Turn:
    roll = rng.random()
    as_word = rng.random() < 0.1
    if roll < 0.36:
        a, b = _operands(rng)
        return _sum(a, b, "+", ask(ADD, rng, a=_shown(a, rng, as_word), b=_shown(b, rng, as_word)))
    if roll < 0.62:
        a, b = _operands(rng)
        if a < b and rng.random() < 0.85:
            a, b = b, a
        return _sum(a, b, "-", ask(SUBTRACT, rng, a=_shown(a, rng, as_word), b=_shown(b, rng, as_word)))
    if roll < 0.80:
        a, b = _small(rng), _small(rng)
        if rng.random() < 0.06:
            return _sum(a, a, "*", ask(SQUARE, rng, a=a))
        if rng.random() < 0.06:
            return _sum(2, a, "*", ask(TWICE, rng, a=a))
        return _sum(a, b, "*", ask(TIMES, rng, a=_shown(a, rng, as_word), b=_shown(b, rng, as_word)))
    big = 10 ** rng.randint(3, 6)
    if roll < 0.85:
        a, b = rng.randint(100, big), rng.randint(0, big) if rng.random() < 0.6 else rng.randint(0, 99)
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        return Turn(ask(ADD if rng.random() < 0.5 else SUBTRACT, rng, a=a, b=b), BIG_SUM)
    if roll < 0.90:
        a = rng.randint(MAX_FACTOR + 1, 99) if rng.random() < 0.4 else rng.randint(MAX_FACTOR + 1, big)
        b = rng.randint(2, 99) if rng.random() < 0.6 else rng.randint(2, big)
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        return Turn(ask(TIMES, rng, a=a, b=b), BIG_TIMES)
    top = 200 if rng.random() < 0.7 else 10_000
    return Turn(ask(DIVIDE, rng, a=rng.randint(1, top), b=rng.randint(1, 50), c=rng.randint(1, 50)), NO_DIVISION)


def number_turn(rng: random.Random) -> Turn:
    """Which is bigger, even or odd, what comes after."""
    kind = rng.randrange(4)
    a, b = rng.sample(range(100), 2)
    patterns: tuple[str, ...]
    if kind == 0:
        patterns = (
            "Which is bigger, {a} or {b}?",
            "What is larger, {a} or {b}?",
            "Is {a} bigger than {b}?",
            "Which number is greater: {a} or {b}?",
        )
        return Turn(ask(patterns, rng, a=a, b=b), f"{max(a, b)} is bigger than {min(a, b)}.")
    if kind == 1:
        patterns = ("Is {a} even or odd?", "Is {a} an even number?", "Is {a} odd?", "Is the number {a} even or odd?")
        return Turn(ask(patterns, rng, a=a), f"{a} is {'odd' if a % 2 else 'even'}.")
    if kind == 2:
        patterns = (
            "What comes after {a}?",
            "Which number comes after {a}?",
            "What number follows {a}?",
            "What is the number after {a}?",
        )
        return Turn(ask(patterns, rng, a=a), f"{a + 1} comes after {a}.")
    a = max(a, 1)
    patterns = ("What comes before {a}?", "Which number comes before {a}?", "What is the number before {a}?")
    return Turn(ask(patterns, rng, a=a), f"{a - 1} comes before {a}.")
