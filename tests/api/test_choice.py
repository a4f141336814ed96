"""Several tokens of a choice at once, as a step with drafts or a slow reader brings them: what a client sees is the
same as if they had come one after the other, and what is behind a stop string is nobody's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gptq_api.api.answers.choice import Choice
from gptq_api.api.answers.formats import Call, Told
from gptq_api.engine.generation import Delta
from gptq_api.text.folder import checkpoint_folder
from gptq_api.text.parts import StoppedReader
from gptq_api.text.stream import TextStream
from gptq_api.text.tokenizer import Tokenizer, load_tokenizer
from gptq_api.text.tools.layouts import HERMES
from gptq_api.text.tools.reader import AnswerReader
from gptq_api.types import FinishReason, SamplingParams, TokenLogprobs

PLAIN = "I see: one two, \u20ac 5 \U0001f600\U0001f600! Then three stops."
CALLED = "<think>\nWhere is it?\u2026</think>\n\nOne look. " + "".join(
    f'<tool_call>\n{{"name": "look", "arguments": {{"at": "{place}", "how": [1, {{"x": "}}"}}]}}}}\n</tool_call>'
    for place in ("M\u00fcnchen", "the stops")
)
STOPS = [(), ("two",), ("stops", "three st"), ("\U0001f600!",), ("One look", "e"), (" ",)]


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(checkpoint_folder("demo"))


@dataclass
class Seen:
    """All that a client or a bill may depend on."""

    told: Told = field(default_factory=Told)
    num_tokens: int = 0
    num_reasoning_tokens: int = 0
    ids: list[int] = field(default_factory=list)
    stop_string: str | None = None
    mean_logprob: float = 0.0


def new_reader(stop: Sequence[str]) -> StoppedReader:
    return StoppedReader(AnswerReader(HERMES, "may", new_id=lambda: "call_1"), stop)


def seen(
    tokens: list[int],
    runs: Sequence[int],
    stop: Sequence[str] = (),
    reason: FinishReason = "length",
    reader: Callable[[Sequence[str]], StoppedReader] | None = None,
    logprobs: bool = True,
) -> Seen:
    """What comes of tokens in deltas of so many."""
    params = SamplingParams(max_tokens=len(tokens), top_logprobs=0 if logprobs else None)
    text = TextStream(tokenizer(), stop=stop if reader is None else (), continues=True)
    choice = Choice(0, 0, params, text, None if reader is None else reader(stop))
    choice.token_ids = []
    found, start = Seen(), 0
    for run in runs:
        news = tokens[start : start + run]
        start += run
        numbers = [TokenLogprobs(-float(start - run + i), []) for i in range(len(news))] if logprobs else []
        delta = Delta(0, list(news), numbers, finish_reason=reason if start >= len(tokens) else None)
        for piece in choice.take(delta):
            found.told.add(piece)
            found.ids += choice.new_ids()
        if choice.finish_reason is not None:
            break
    assert choice.finish_reason is not None
    found.num_tokens, found.num_reasoning_tokens = choice.num_tokens, choice.num_reasoning_tokens
    found.stop_string, found.mean_logprob = choice.stop_string, round(choice.mean_logprob, 9)
    found.ids += choice.new_ids()
    return found


def one_by_one(tokens: list[int], *args: Any, **kwargs: Any) -> Seen:
    return seen(tokens, [1] * len(tokens), *args, **kwargs)


CUTS = st.lists(st.integers(1, 9), min_size=40, max_size=40)


@given(CUTS, st.sampled_from(STOPS), st.sampled_from(["stop", "length"]), st.booleans())
@example([100] * 40, ("two",), "stop", True)
def test_a_text_is_the_same_in_any_runs(cuts: list[int], stop: Sequence[str], reason: Any, logprobs: bool) -> None:
    tokens = [*tokenizer().encode(PLAIN), tokenizer().eos_token_id or 0]
    same = partial(seen, tokens, stop=stop, reason=reason, logprobs=logprobs)
    assert same(runs=[*cuts, len(tokens)]) == one_by_one(tokens, stop, reason, None, logprobs)


@given(CUTS, st.sampled_from(STOPS), st.sampled_from(["stop", "length"]), st.booleans())
@example([200] * 40, ("One look", "e"), "stop", True)
def test_thoughts_and_calls_are_the_same_in_any_runs(
    cuts: list[int], stop: Sequence[str], reason: Any, logprobs: bool
) -> None:
    tokens = [*tokenizer().encode(CALLED), tokenizer().eos_token_id or 0]
    same = partial(seen, tokens, stop=stop, reason=reason, reader=new_reader, logprobs=logprobs)
    assert same(runs=[*cuts, len(tokens)]) == one_by_one(tokens, stop, reason, new_reader, logprobs)


def test_one_run_holds_thoughts_words_and_calls() -> None:
    tokens = [*tokenizer().encode(CALLED), tokenizer().eos_token_id or 0]
    told = seen(tokens, [len(tokens)], reason="stop", reader=new_reader).told
    assert (told.reasoning.strip(), told.text.strip()) == ("Where is it?\u2026", "One look.")
    arguments = '{"at": "M\u00fcnchen", "how": [1, {"x": "}"}]}'
    assert told.calls[0] == Call("call_1", "look", arguments) and len(told.calls) == 2
    assert told.finish_reason == "tool_calls"


@pytest.mark.parametrize("logprobs", [True, False])
@pytest.mark.parametrize("reader", [None, new_reader])
def test_nothing_behind_a_stop_string_is_shown_or_billed(reader: Any, logprobs: bool) -> None:
    tokens = tokenizer().encode(PLAIN)
    found = seen(tokens, [len(tokens)], ("two",), "length", reader, logprobs)
    assert found.told.text == PLAIN[: PLAIN.index("two")] and found.told.finish_reason == "stop"
    text = tokenizer().decode(tokens[: found.num_tokens])
    assert "two" in text and "two" not in tokenizer().decode(tokens[: found.num_tokens - 1])
    assert found.ids == tokens[: found.num_tokens] and found.stop_string == "two"
    if logprobs:
        assert [entry.token_id for entry in found.told.entries] == tokens[: len(found.told.entries)]
        assert all(entry.text_offset < len(found.told.text) for entry in found.told.entries)
        assert [-entry.logprobs.logprob for entry in found.told.entries] == list(range(len(found.told.entries)))
