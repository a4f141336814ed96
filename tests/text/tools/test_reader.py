"""Thoughts and calls in a text, however it is cut into pieces."""

from __future__ import annotations

import itertools
import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptq_api.text.parts import Parts, StoppedReader
from gptq_api.text.tools.layouts import GENERIC, HERMES, LLAMA_3, MISTRAL, CallLayout, layout_of
from gptq_api.text.tools.reader import AnswerReader, new_call_id

ARGUMENTS = ['{"city": "Pa}ris\\"{"}', "{}", '{"a": [1, {"b": "</tool_call>"}], "c": null}']


def written(layout: CallLayout, *calls: tuple[str, str]) -> str:
    texts = [f"{layout.head}{name}{layout.middle}{arguments}}}" for name, arguments in calls]
    return layout.begin + layout.opening + layout.between.join(texts) + layout.closing


CASES: dict[str, tuple[CallLayout | None, Literal["", "may", "does"], str, tuple[str, str, list[tuple[str, str]]]]] = {
    "words": (HERMES, "", "Hello <b>", ("", "Hello <b>", [])),
    "nothing": (HERMES, "", "", ("", "", [])),
    "almost a mark": (HERMES, "", "a <tool_cal", ("", "a <tool_cal", [])),
    "no tools": (None, "", written(HERMES, ("f", "{}")), ("", written(HERMES, ("f", "{}")), [])),
    "an object that is no call": (LLAMA_3, "", '{"name": 5}', ("", '{"name": 5}', [])),
    "a call later on": (LLAMA_3, "", 'say {"name": "f"', ("", 'say {"name": "f"', [])),
    "thoughts": (None, "may", "<think>\nhm</think>\n\nyes", ("\nhm", "yes", [])),
    "no thoughts": (None, "may", "<thin", ("", "<thin", [])),
    "thoughts begun": (None, "does", "hm</think>\nyes </think>", ("hm", "yes </think>", [])),
    "only thoughts": (HERMES, "does", "hm </thi", ("hm </thi", "", [])),
    "thoughts and a call": (
        LLAMA_3,
        "does",
        "hm</think>\n\n" + written(LLAMA_3, ("f", "{}")),
        ("hm", "", [("f", "{}")]),
    ),
}
CASES |= {
    "other white space": (HERMES, "", '<tool_call>{"name":"f","arguments":{}}</tool_call>', ("", "", [("f", "{}")])),
    "lines": (LLAMA_3, "", '{\n  "name": "f",\n  "parameters": {}\n}', ("", "", [("f", "{}")])),
}
for _layout in (HERMES, LLAMA_3, MISTRAL, GENERIC):
    for _number, _calls in enumerate([[("f", ARGUMENTS[0])], [("f", ARGUMENTS[1]), ("g.h-2", ARGUMENTS[2])]]):
        CASES[f"{_layout.name} {_number}"] = (_layout, "", written(_layout, *_calls), ("", "", _calls))
        if _layout.begin:
            CASES[f"{_layout.name} {_number} behind words"] = (
                _layout,
                "",
                "I see. " + written(_layout, *_calls),
                ("", "I see. ", _calls),
            )


def read(reader: Any, pieces: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """All parts put together, as a client does."""
    parts, calls = Parts(), list[list[str]]()
    for piece in [*map(reader.push, pieces), reader.finish()]:
        parts += piece
    for delta in parts.calls:
        if delta.id is not None:
            assert delta.index == len(calls) and delta.name is not None
            calls.append([delta.name, ""])
        else:
            assert delta.index == len(calls) - 1 and delta.name is None
        calls[delta.index][1] += delta.arguments
    return parts.reasoning, parts.content, [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize("name", CASES)
def test_every_cut_gives_the_same(name: str) -> None:
    layout, thinks, text, expected = CASES[name]
    for first, second in itertools.combinations_with_replacement(range(0, len(text) + 1, 1 + len(text) // 60), 2):
        reader = AnswerReader(layout, thinks)
        assert read(reader, [text[:first], text[first:second], text[second:]]) == expected
        assert reader.has_calls == bool(expected[2])
    assert read(AnswerReader(layout, thinks), list(text)) == expected


@given(name=st.sampled_from(list(CASES)), cuts=st.lists(st.integers(0, 200)))
def test_any_number_of_cuts(name: str, cuts: list[int]) -> None:
    layout, thinks, text, expected = CASES[name]
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(ends)]
    assert read(AnswerReader(layout, thinks), pieces) == expected


def test_words_are_told_at_once() -> None:
    reader = AnswerReader(HERMES)
    assert reader.push("Hello <").content == "Hello "
    assert reader.push("b>").content == "<b>"
    assert reader.push("<tool_call>\n" + '{"name": "f", "argum').calls == []
    begun, first = reader.push('ents": {').calls
    assert (begun.index, begun.name, begun.arguments, first.arguments) == (0, "f", "", "{")
    assert [delta.arguments for delta in reader.push('"a": "b').calls] == ['"a": "b']


def test_a_call_that_is_cut_keeps_what_was_told() -> None:
    text = written(HERMES, ("f", '{"a": 1}'))
    assert read(AnswerReader(HERMES), [text[: text.index(" 1}")]]) == ("", "", [("f", '{"a":')])
    assert read(AnswerReader(HERMES), [text[:20]]) == ("", "", [])


def test_stop_texts_count_in_words_alone() -> None:
    reader = StoppedReader(AnswerReader(HERMES, "may"), ["Paris"])
    text = "<think>Paris</think>Rome" + written(HERMES, ("f", '{"a": "Paris"}'))
    assert read(reader, list(text)) == ("Paris", "Rome", [("f", '{"a": "Paris"}')]) and not reader.stopped
    reader = StoppedReader(AnswerReader(HERMES), ["Paris"])
    parts = reader.push("in Paris, <tool_call>")
    assert (parts.content, reader.stopped, reader.stop_string) == ("in ", True, "Paris")


def test_ids_are_new_and_of_the_family() -> None:
    assert len({new_call_id(HERMES) for _ in range(100)}) == 100
    assert new_call_id(HERMES).startswith("call_") and len(new_call_id(HERMES)) == 29
    assert len(new_call_id(MISTRAL)) == 9 and new_call_id(MISTRAL).isalnum()


@pytest.mark.parametrize(
    ("jinja", "layout"),
    [
        ("{% for tool in tools %}{{ tool }}{% endfor %}[TOOL_CALLS]", MISTRAL),
        ("{% for tool in tools %}{{ tool }}{% endfor %}<tool_call>", HERMES),
        ('{% for tool in tools %}{{ tool }}{% endfor %}{"name": x, "parameters": y}', LLAMA_3),
        ("{% for tool in tools %}{{ tool }}{% endfor %}in some other way", GENERIC),
        ("<tool_call>", GENERIC),
    ],
)
def test_layouts_are_told_by_templates(jinja: str, layout: CallLayout) -> None:
    assert layout_of(jinja, {"tools"} if "tools" in jinja else {"messages"}) is layout


def test_what_is_read_is_json() -> None:
    for layout in (HERMES, LLAMA_3, MISTRAL):
        _, _, calls = read(AnswerReader(layout), [written(layout, ("f", ARGUMENTS[0]), ("g", ARGUMENTS[2]))])
        assert [json.loads(arguments) for _, arguments in calls] == [json.loads(ARGUMENTS[0]), json.loads(ARGUMENTS[2])]
