"""Guesses from texts: where a text's end stood before, in which text, and whose."""

from __future__ import annotations

import random
import time

from gptq_api.scheduler.drafts import LONGEST_MATCH, Guess, Pairs, PastAnswers, TextDrafts
from gptq_api.scheduler.sequence import Sequence
from gptq_api.types import SamplingParams


def sequence(prompt: list[int], answer: list[int], prediction: list[int] | None = None, salt: bytes = b"") -> Sequence:
    seq = Sequence(1, list(prompt), SamplingParams(max_tokens=1000), salt)
    seq.prediction = prediction or []
    for token in answer:
        seq.append(token)
    return seq


def longest_match(text: list[int], ending: list[int]) -> tuple[int, int]:
    """By trying every place that something follows."""
    best, found = 0, 0
    for place in range(len(text) - 1, 0, -1):
        match = 0
        while match < min(place, len(ending), LONGEST_MATCH) and text[place - 1 - match] == ending[-1 - match]:
            match += 1
        if match > max(best, 1):
            best, found = match, place
    return best, found


def test_the_longest_match_is_found_and_of_equal_ones_the_last() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = [rng.randrange(6) for _ in range(rng.randrange(1, 60))]
        pairs = Pairs()
        for end in range(len(text)):
            assert pairs.take_in(text[: end + 1])
        ending = text if rng.random() < 0.5 else [rng.randrange(6) for _ in range(rng.randrange(20))]
        assert pairs.find(text, ending) == longest_match(text, ending)


def test_a_text_goes_on_as_it_did_before() -> None:
    drafts = TextDrafts()
    assert drafts.guess(sequence([1, 2, 3, 4, 5, 1, 2], []), 3) == Guess([3, 4, 5], 2, "text")
    assert drafts.guess(sequence([1, 2, 3, 4, 5, 9, 3], [4]), 8) == Guess([5, 9, 3, 4, 5, 9, 3, 4], 2, "text")
    assert drafts.guess(sequence([7, 7, 7, 7], []), 5) == Guess([7] * 5, 3, "text")
    for few in ([1], [1, 2], [1, 2, 3], [1, 2, 1]):
        assert drafts.guess(sequence(few, []), 5) is None


def test_a_prediction_is_followed_from_its_beginning_and_found_again_after_a_difference() -> None:
    drafts = TextDrafts()
    prediction = [10, 11, 12, 13, 14, 15, 16]
    seq = sequence([1, 2], [], prediction)
    assert drafts.guess(seq, 3) == Guess([10, 11, 12], 0, "prediction")
    seq.append(10)
    assert drafts.guess(seq, 3) == Guess([11, 12, 13], 1, "prediction")
    seq.append(11)
    assert drafts.guess(seq, 3) == Guess([12, 13, 14], 2, "prediction")
    seq.append(50)
    assert drafts.guess(seq, 3) is None
    for token in (13, 14):
        seq.append(token)
    assert drafts.guess(seq, 3) == Guess([15, 16], 2, "prediction")
    seq.append(15)
    seq.append(16)
    assert drafts.guess(seq, 3) is None, "it has come to its end"
    other = sequence([1, 2], [9], prediction)
    assert drafts.guess(other, 3) is None


def test_whoever_copies_goes_on_behind_what_was_copied_last() -> None:
    """A text of paragraphs that begin alike, each with a line of its own: drafted by its place, not by the last one
    that begins so. From a prediction, from the prompt, and from a past answer."""
    same = list(range(100, 100 + LONGEST_MATCH + 4))
    text = [token for i in range(9) for token in (*same, 200 + i)]
    past = TextDrafts(PastAnswers())
    past.ended(sequence([7, 8, 9], text))
    for drafts, prompt, prediction in (
        (TextDrafts(), [7, 8, 9], text),
        (TextDrafts(), [*text, 7, 8, 9], []),
        (past, [7, 8, 9], []),
    ):
        seq, num_steps = sequence(prompt, [], prediction), 0
        rest = list(text)
        while rest:
            guess, num = drafts.guess(seq, 7), 0
            while guess is not None and num < len(guess.tokens) and guess.tokens[num : num + 1] == rest[num : num + 1]:
                num += 1
            for token in rest[: num + 1]:
                seq.append(token)
            del rest[: num + 1]
            num_steps += 1
        assert num_steps <= len(text) // 8 + 4


def test_a_prediction_that_begins_like_the_answer_goes_before_past_answers() -> None:
    drafts = TextDrafts(PastAnswers())
    prompt = list(range(50, 80))
    drafts.ended(sequence(prompt, [20, 21, 22, 23, 24]))
    seq = sequence(prompt, [20, 21], [20, 21, 32, 33])
    assert drafts.guess(seq, 2) == Guess([32, 33], 2, "prediction")
    seq.append(22)
    assert drafts.guess(seq, 2) == Guess([23, 24], LONGEST_MATCH, "past")


def test_past_answers_are_those_of_the_same_salt() -> None:
    drafts = TextDrafts(PastAnswers())
    drafts.ended(sequence([1, 2, 3], [20, 21, 22, 23], salt=b"mine"))
    assert drafts.guess(sequence([9, 2, 3], [], salt=b"mine"), 3) == Guess([20, 21, 22], 2, "past")
    assert drafts.guess(sequence([1, 2, 3], [20, 21], salt=b"mine"), 9) == Guess([22, 23], 5, "past")
    assert drafts.guess(sequence([1, 2, 3], [20, 21, 22, 23], salt=b"mine"), 9) is None
    for salt in (b"", b"theirs"):
        assert drafts.guess(sequence([1, 2, 3], [20, 21], salt=salt), 9) is None
    assert TextDrafts().guess(sequence([1, 2, 3], [], salt=b"mine"), 3) is None


def test_past_answers_take_a_bounded_memory_and_the_salt_used_last_keeps_its_own() -> None:
    past = PastAnswers(most_tokens=1000, longest=200)
    rng = random.Random(1)
    for i in range(300):
        answer = [rng.randrange(1000) for _ in range(rng.randrange(2, 400))]
        past.add(b"salt %d" % (i % 7), [*range(30), *answer], 30)
        kept = {salt: len(text.tokens) for salt, text in past.texts.items()}
        assert sum(kept.values()) == past.num_tokens <= 1000 and max(kept.values()) <= 400
        assert past.find(b"salt %d" % (i % 7), answer[:2], 1)[0] == 2 or len(answer) < 3


def test_a_guess_costs_microseconds_however_long_the_text_is() -> None:
    rng = random.Random(2)
    for vocab in (4, 30_000):  # each pair a thousand times, or once
        seq = sequence([rng.randrange(vocab) for _ in range(32_768)], [])
        drafts = TextDrafts(PastAnswers())
        tries = 0
        while seq.knowledge is None or seq.knowledge.pairs.num_tokens < len(seq.token_ids) - 1:
            drafts.guess(seq, 7)
            tries += 1
        assert tries == 8, "it is taken in piece by piece"
        times = []
        for _ in range(200):
            seq.append(rng.randrange(vocab))
            began = time.perf_counter()
            drafts.guess(seq, 7)
            times.append(time.perf_counter() - began)
        assert sorted(times)[20] < 1e-3, "not in proportion to the text, whoever else uses the machine"
