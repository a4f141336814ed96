"""Streaming equals one-shot decoding for any tokens in any grouping, and nothing of a stop string is ever shown."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_api.text.stream import TextStream
from gptq_api.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.text_tokenizers import KINDS, spm


@cache
def make(kind: str) -> Tokenizer:
    with TemporaryDirectory() as folder:
        return load_tokenizer(KINDS[kind](Path(folder)))


def one_by_one(stream: TextStream, ids: Sequence[int]) -> list[str]:
    return [stream.push([token]) for token in ids] + [stream.finish()]


def groups(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pushes_together_are_the_one_shot_text(kind: str, skip_special: bool, data: st.DataObject) -> None:
    tokenizer = make(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=60))
    cuts = data.draw(st.lists(st.integers(0, 60), max_size=8))
    stream = TextStream(tokenizer, skip_special=skip_special)
    shown = "".join(stream.push(group) for group in groups(ids, cuts))
    assert shown + stream.finish() == tokenizer.decode(ids, skip_special=skip_special)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_where_each_tokens_text_stands(kind: str, data: st.DataObject) -> None:
    """It begins behind the whole characters of the tokens before it, and ends with its last one, torn or not."""
    tokenizer = make(kind)
    ids = tokenizer.encode(data.draw(st.text(alphabet="ab# é你👋", max_size=30)))
    stream, plain = TextStream(tokenizer, stop=["#a"]), TextStream(tokenizer, stop=["#a"])
    for i, token in enumerate(ids):
        whole = tokenizer.decode(ids[:i]).rstrip("\ufffd")
        shown, start, end = stream.push_token(token)
        assert shown == plain.push([token])
        assert (start, end) == (len(whole), len(tokenizer.decode(ids[: i + 1])))
        if stream.stopped:
            break
    assert (stream.num_tokens, stream.stopped) == (plain.num_tokens, plain.stopped)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
@pytest.mark.slow
def test_stop_strings_cut_exactly_where_the_text_says(kind: str, data: st.DataObject) -> None:
    tokenizer = make(kind)
    text = data.draw(st.text(alphabet="ab# é你👋", max_size=30))
    stops = data.draw(st.lists(st.text(alphabet="ab# é你👋", min_size=1, max_size=4), min_size=1, max_size=3))
    include = data.draw(st.booleans())
    stream = TextStream(tokenizer, stop=stops, include_stop=include)
    pushes = one_by_one(stream, tokenizer.encode(text))
    # the first character that completes a stop string; of those completed there, the longest
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if ends:
        longest = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
        expected = text[: ends[0]] if include else text[: ends[0] - len(longest)]
        assert stream.stop_string == longest
    else:
        expected = text
    assert "".join(pushes) == expected
    assert stream.stopped is bool(ends)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shown_is_whole_characters_as_early_as_possible(kind: str) -> None:
    tokenizer = make(kind)
    text = "x 👩‍👩‍👧‍👦 你好, naïve 🤖"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # so characters are split over tokens
    stream = TextStream(tokenizer)
    shown = b""
    for i, token in enumerate(ids):
        shown += stream.push([token]).encode()
        assert "\ufffd" not in shown.decode()
        arrived = tokenizer.decode(ids[: i + 1]).encode()
        assert len(arrived.rstrip("\ufffd".encode())) <= len(shown)
    assert (shown + stream.finish().encode()).decode() == text


def test_torn_tail_is_one_replacement_character() -> None:
    tokenizer = make("byte-level")
    ids = [
        next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([b])) for b in b"\xf0\x9f\x91"
    ]
    stream = TextStream(tokenizer)
    assert [stream.push([token]) for token in ids] == ["", "", ""]
    assert stream.finish() == "\ufffd"


def test_spaces_at_the_start(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(spm(tmp_path))
    ids = tokenizer.encode("the fox")
    assert "".join(one_by_one(TextStream(tokenizer), ids)) == "the fox"
    assert "".join(one_by_one(TextStream(tokenizer, continues=True), ids)) == " the fox"
    assert tokenizer.bos_token_id is not None
    assert "".join(one_by_one(TextStream(tokenizer), [tokenizer.bos_token_id, *ids])) == "the fox"
    assert "".join(one_by_one(TextStream(tokenizer), tokenizer.encode("  two"))) == "  two"


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("### Human", ["###"], ""),  # at the first token
        ("Hi there### Human", ["###"], "Hi there"),
        ("almost ## but not", ["###"], "almost ## but not"),  # held back, then released
        ("ends with ##", ["###"], "ends with ##"),  # released by finish
        ("aab aabaab!", ["aabaab"], "aab "),  # overlaps itself
        ("xababac", ["ababac"], "x"),
        ("abcd", ["abcd", "bc"], "a"),  # the one completed first counts
        ("abc", ["c", "bc"], "a"),  # completed together: the longer one
        ("naïve", ["ï"], "na"),  # inside a character's bytes
        ("go 👋🏽 on", ["🏽"], "go 👋"),
        ("line\nUSER: x", ["\nUSER:"], "line"),
        ("any", [""], "any"),  # an empty string stops nothing
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings(kind: str, text: str, stop: list[str], shown: str) -> None:
    tokenizer = make(kind)
    ids = tokenizer.encode(text)
    for stream, pushes in (
        (alone := TextStream(tokenizer, stop=stop), one_by_one(alone, ids)),
        (joined := TextStream(tokenizer, stop=stop), [joined.push(ids), joined.finish()]),
    ):
        assert "".join(pushes) == shown
        assert stream.stopped is (shown != text)
    assert alone.num_tokens == joined.num_tokens <= len(ids)


def test_nothing_after_a_stop_string() -> None:
    tokenizer = make("byte-level")
    stream = TextStream(tokenizer, stop=["stop"])
    ids = tokenizer.encode("go, stop")
    assert "".join(stream.push([token]) for token in ids) == "go, "
    assert stream.push(tokenizer.encode(" and more")) == ""
    assert stream.finish() == ""
    assert stream.num_tokens == len(ids)


def test_a_control_token_is_not_part_of_a_stop_string_unless_shown() -> None:
    tokenizer = make("byte-level")
    end = tokenizer.token_to_id("<|end|>")
    assert end is not None
    ids = [*tokenizer.encode("a"), end, *tokenizer.encode("b")]
    assert "".join(one_by_one(TextStream(tokenizer, stop=["<|end|>"]), ids)) == "ab"
    assert "".join(one_by_one(TextStream(tokenizer, stop=["<|end|>"], skip_special=False), ids)) == "a"
    assert "".join(one_by_one(TextStream(tokenizer, stop=["ab"]), ids)) == ""


def test_cost_per_token_does_not_grow() -> None:
    """20,000 tokens with sixteen long stop strings that nearly match all the time."""
    tokenizer = make("byte-level")
    ids = tokenizer.encode("a" * 2000) * 10
    stops = ["a" * (100_000 + i) + "b" for i in range(16)]
    stream = TextStream(tokenizer, stop=stops)
    start = time.perf_counter()
    shown = "".join(stream.push([token]) for token in ids[:2000])
    held = stream.finish()
    assert len(shown) + len(held) == len(tokenizer.decode(ids[:2000]))
    rng = random.Random(0)
    free = TextStream(tokenizer)
    for _ in range(20_000):
        free.push([rng.randrange(tokenizer.vocab_size)])
    assert time.perf_counter() - start < 5
