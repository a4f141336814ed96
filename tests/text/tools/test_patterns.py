"""Calls of tools in the ways of each family: what is read, however the text was cut, and what grammars allow."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from gptq_api.grammar import compile as grammars
from gptq_api.grammar.vocabulary import byte_vocabulary
from gptq_api.text.parts import Parts, Reader
from gptq_api.text.tokenizer import Tokenizer
from gptq_api.text.tools.layouts import layout_of
from gptq_api.text.tools.patterns.grammar import Demand, write
from gptq_api.text.tools.patterns.reader import CallReader
from gptq_api.text.tools.patterns.scans import KeywordScan
from gptq_api.text.tools.patterns.spelling import FUNCTIONARY_3_1, FUNCTIONARY_3_2, PYTHONIC, Spelling, control_name

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "where": {"$ref": "#/$defs/Place"},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"Place": {"type": "array", "items": {"type": "number"}, "maxItems": 2}},
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
FAMILIES = {"pythonic": PYTHONIC, "functionary-3.1": FUNCTIONARY_3_1, "functionary-3.2": FUNCTIONARY_3_2}
FUNCTIONS = {"get_weather": WEATHER, "now": NOTHING}
CONTROL = ["<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<|python_start|>", "<|python_end|>"]

Case = tuple[str, str, str, list[tuple[str, Any]]]
"""family, text of the model, content, calls"""
PARIS = ("get_weather", {"city": "Paris"})
LIMA = ("get_weather", {"city": 'Lima "{é}" \\', "days": 2})
HERMES_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
LIMA_JSON = r'{"city": "Lima \"{é}\" \\", "days": 2}'
NOW: tuple[str, dict[str, Any]] = ("now", {})

CALLS: list[Case] = [
    ("functionary-3.1", '<function=get_weather>{"city": "Paris"}</function>', "", [PARIS]),
    (
        "functionary-3.1",
        f"So: <function=get_weather>{LIMA_JSON}</function><function=now>{{}}</function>",
        "So:",
        [LIMA, NOW],
    ),
    ("functionary-3.2", 'get_weather\n{"city": "Paris"}', "", [PARIS]),
    ("functionary-3.2", f"all\nI look.\n>>>get_weather\n{LIMA_JSON}>>>now\n{{}}", "I look.", [LIMA, NOW]),
    ("pythonic", '[get_weather(city="Paris")]', "", [PARIS]),
    ("pythonic", r'[get_weather(city="Lima \"{é}\" \\", days=2), now()]', "", [LIMA, NOW]),
    (
        "pythonic",
        '[get_weather(city="Paris", where=[1, 2.5])]',
        "",
        [("get_weather", {"city": "Paris", "where": [1, 2.5]})],
    ),
    ("pythonic", "<|python_start|>[now()]<|python_end|>", "", [NOW]),
]
TEXTS: list[Case] = [
    ("functionary-3.1", "<function is a word", "<function is a word", []),
    ("functionary-3.2", "all\nHello >> there\n", "Hello >> there\n", []),
    ("functionary-3.2", "all\n", "", []),
    ("pythonic", "[link](http://x)", "[link](http://x)", []),
    ("pythonic", "[now or never]", "[now or never]", []),
]
WRONG: list[Case] = [
    ("functionary-3.1", "<function=then>{}</function>", "<function=then>{}</function>", []),
    ("pythonic", "[then()]", "[then()]", []),
]
"""what no grammar of ours lets through; it is text"""
CUT: list[Case] = []
QUICK_SPLITS = (1, 2, 3, 7)


def read(reader: Reader, pieces: Sequence[str]) -> Parts:
    parts = Parts()
    for piece in pieces:
        parts += reader.push(piece)
    parts += reader.finish()
    return parts


def calls_of(parts: Parts) -> list[tuple[str, str]]:
    """(name, arguments) of each call; asserts the rules of deltas."""
    calls: list[tuple[str, str]] = []
    for delta in parts.calls:
        if delta.id is None:
            assert delta.name is None and delta.arguments and delta.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
        else:
            assert re.fullmatch("(call_[a-zA-Z0-9]{24})|([a-zA-Z0-9]{9})", delta.id)
            assert delta.index == len(calls) and delta.arguments == "" and delta.name
            calls.append((delta.name, ""))
    return calls


def cut(text: str, length: int) -> list[str]:
    return [text[at : at + length] for at in range(0, len(text), length)]


def names(cases: list[Case]) -> list[Any]:
    return [pytest.param(case, id=f"{case[0]}-{number}") for number, case in enumerate(cases)]


@pytest.mark.parametrize("case", names(CALLS + TEXTS + WRONG + CUT))
def test_the_same_is_read_however_a_text_was_cut(case: Case) -> None:
    family, text, content, calls = case
    if hidden := FAMILIES[family].also_closing:  # a control token that is skipped
        text = text.replace(hidden, "")
    splits = [[text], *(cut(text, length) for length in QUICK_SPLITS)]
    splits += [[text[:at], text[at:]] for at in range(len(text))]
    for pieces in splits:
        reader = CallReader(FAMILIES[family], FUNCTIONS)
        parts = read(reader, pieces)
        assert parts.content == content, pieces
        assert [(name, json.loads(arguments)) for name, arguments in calls_of(parts)] == calls, pieces
        assert reader.has_calls == bool(calls)


ALPHABET = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        '{"name": "now", ',
        '"arguments": {}}',
        '{"name": "get_weather", "parameters": {"city": "}"}}',
        "[TOOL_CALLS]",
        "[ARGS]",
        "<function=now>",
        ">>>",
        "now(",
        "[",
        ")",
        "]",
        "{",
        "}",
        '"',
        "\\",
        " ",
        "\n",
        "; ",
        "é",
        "all\n",
        "<|python_tag|>",
        "functools[",
        "<think>",
        "</think>",
        "x",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.lists(ALPHABET, max_size=12), st.data())
def test_any_split_of_any_text_gives_the_same_parts(family: str, words: list[str], data: st.DataObject) -> None:
    text = "".join(words)

    def parts_of(pieces: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
        parts = read(CallReader(FAMILIES[family], FUNCTIONS), pieces)
        return parts.content, calls_of(parts)

    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert parts_of(pieces) == parts_of([text]) == parts_of(list(text))


def test_arguments_are_told_as_they_come() -> None:
    reader = CallReader(FUNCTIONARY_3_1, FUNCTIONS)
    assert not reader.push("So: <function=get_weather>").calls
    assert [delta.arguments for delta in reader.push("{").calls] == ["", "{"]
    assert [delta.arguments for delta in reader.push('"city": "Pa').calls] == ['"city": "Pa']
    assert [delta.arguments for delta in reader.push('ris"}</func').calls] == ['ris"}']


def test_text_waits_only_while_it_may_become_a_call() -> None:
    reader = CallReader(FUNCTIONARY_3_1, FUNCTIONS)
    assert reader.push("Hello <").content == "Hello"
    assert reader.push("b> and").content == " <b> and"
    reader = CallReader(PYTHONIC, FUNCTIONS)
    assert reader.push("[get_w").content == ""
    assert reader.push("hat]").content == "[get_what]"


@pytest.mark.parametrize(
    "written,told",
    [
        (")", "{}"),
        ("a=1)", '{"a": 1}'),
        ("a=1, b='x')", '{"a": 1, "b": "x"}'),
        ("a=True, b=[None, 'it\\'s'], c={'k': False})", '{"a": true, "b": [null, "it\'s"], "c": {"k": false}}'),
        ('a="True )", b=-1.5e+3)', '{"a": "True )", "b": -1.5e+3}'),
        ("a='say \"x\"')", '{"a": "say \\"x\\""}'),
        ('**{"a-b": [1]})', '{"a-b": [1]}'),
        ("a='\\n\\d')", '{"a": "\\n\\\\d"}'),
    ],
)
def test_keyword_arguments_are_told_as_json(written: str, told: str) -> None:
    for length in (1, 2, 100):
        scan = KeywordScan()
        found = [scan.push(piece)[0] for piece in cut(written, length)]
        assert "".join(found) == told and scan.done
        json.loads(told)


# Grammars


class Words(Tokenizer):
    """Only what grammars ask of a tokenizer: which control tokens there are."""

    def __init__(self, control: Sequence[str]) -> None:
        self._special_ids = {name: 257 + i for i, name in enumerate(control)}
        self._names = {i: name for name, i in self._special_ids.items()}
        self.special_token_ids = frozenset(self._special_ids.values())
        self.special_pattern = re.compile("|".join(map(re.escape, control)) if control else r"(?!)")

    def token_to_id(self, token: str) -> int | None:
        return self._special_ids.get(token)

    def id_to_token(self, token_id: int) -> str:
        return self._names[token_id]


def vocabularies(control: Sequence[str]) -> tuple[Words, LLTokenizer]:
    return Words(control), byte_vocabulary(control)


def accepts(words: Words, vocabulary: LLTokenizer, lark: str, text: str) -> bool:
    matcher = LLMatcher(vocabulary, grammars.native_lark(lark), limits=grammars.limits())
    assert not matcher.is_error(), matcher.get_error()
    ids: list[int] = []
    for part in words.split_special(text):
        ids += [part] if isinstance(part, int) else list(part.encode())
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    "control",
    [(), CONTROL],
    ids=["text", "control"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_grammars_allow_what_families_write(family: str, control: Sequence[str]) -> None:
    words, vocabulary = vocabularies(control)
    auto = write(FAMILIES[family], words, Demand(FUNCTIONS), grammars.embedded)
    forced = write(FAMILIES[family], words, Demand(FUNCTIONS, must_call=True), grammars.embedded)
    single = write(FAMILIES[family], words, Demand(FUNCTIONS, many=False), grammars.embedded)
    pattern = FAMILIES[family]
    marks = [mark for mark in (pattern.also, pattern.also_closing) if mark and mark not in control]
    for name, text, content, calls in CALLS + TEXTS:
        if name != family or any(mark in text for mark in marks):
            continue
        assert accepts(words, vocabulary, auto, text), text
        assert accepts(words, vocabulary, single, text) == (len(calls) < 2), text
        assert accepts(words, vocabulary, forced, text) == (bool(calls) and not content), text


BAD_ARGUMENTS = [
    ("functionary-3.1", "<function=get_weather>{}</function>"),
    ("functionary-3.2", "get_weather\n{}"),
    ("functionary-3.2", "Hello"),
    ("pythonic", "[get_weather(days=2)]"),
    ("pythonic", "[get_weather(city=Paris)]"),
    ("pythonic", "[now(x=1)]"),
]


@pytest.mark.parametrize("family,text", BAD_ARGUMENTS)
def test_grammars_allow_nothing_else_once_a_call_is_begun(family: str, text: str) -> None:
    words, vocabulary = vocabularies(["[TOOL_CALLS]"])
    assert not accepts(words, vocabulary, write(FAMILIES[family], words, Demand(FUNCTIONS), grammars.embedded), text)


ANSWER = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "at": {"$ref": "#/$defs/N"}},
    "required": ["name", "at"],
    "additionalProperties": False,
    "$defs": {"N": {"type": "integer"}},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_beside_tools_an_answer_obeys_its_format(family: str) -> None:
    words, vocabulary = vocabularies(CONTROL)
    lark = write(FAMILIES[family], words, Demand(FUNCTIONS, answer=ANSWER), grammars.embedded)
    assert accepts(words, vocabulary, lark, '{"name": "x", "at": 3}')
    assert not accepts(words, vocabulary, lark, '{"name": "x", "at": "3"}')
    assert not accepts(words, vocabulary, lark, "Hello")
    text = next(text for name, text, _, calls in CALLS if name == family and len(calls) == 1)
    assert accepts(words, vocabulary, lark, text)


def test_a_control_token_has_a_name_for_grammars() -> None:
    assert control_name("<|python_tag|>") == "<|python_tag|>" and control_name("[TOOL_CALLS]") == "<|TOOL_CALLS|>"


@pytest.mark.parametrize(
    "template,pattern",
    [
        ("<function=", FUNCTIONARY_3_1),
        (">>>all", FUNCTIONARY_3_2),
        ("[func_name1(params_name1=params_value1)]", PYTHONIC),
        ("<tool_call><function=..><parameter=..>", None),
        ("<tool_call>", None),
    ],
)
def test_the_pattern_is_seen_in_the_template(template: str, pattern: Spelling | None) -> None:
    assert layout_of("{{ tools }}" + template, {"tools"}).pattern == pattern
    assert layout_of(template, set()).pattern is None
