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
from gptq_api.text.thoughts import PlainReader, ThoughtReader
from gptq_api.text.tokenizer import Tokenizer
from gptq_api.text.tool_formats.families import FAMILIES, family_of
from gptq_api.text.tool_formats.grammar import Demand, Thoughts, write
from gptq_api.text.tool_formats.reader import CallReader
from gptq_api.text.tool_formats.scans import KeywordScan, StringScan
from gptq_api.text.tool_formats.spelling import control_name

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
FUNCTIONS = {"get_weather": WEATHER, "now": NOTHING}
CONTROL = ["<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<|python_start|>", "<|python_end|>"]

Case = tuple[str, str, str, list[tuple[str, Any]]]
"""family, text of the model, content, calls"""
PARIS = ("get_weather", {"city": "Paris"})
LIMA = ("get_weather", {"city": 'Lima "{é}" \\', "days": 2})
HERMES_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
LIMA_JSON = r'{"city": "Lima \"{é}\" \\", "days": 2}'
NOW = ("now", {})

CALLS: list[Case] = [
    ("llama-3", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    ("llama-3", '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    ("llama-3", 'I look.<|python_tag|>{"name": "now", "parameters": {}}', "I look.", [NOW]),
    (
        "llama-3",
        f'{{"name": "get_weather", "parameters": {LIMA_JSON}}}; {{"name": "now", "parameters": {{}}}}',
        "",
        [LIMA, NOW],
    ),
    ("llama-3", '{\n  "name": "get_weather",\n  "parameters": {\n    "city": "Paris"\n  }\n}', "", [PARIS]),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", [PARIS]),
    (
        "hermes",
        f'Let me see.\n\n<tool_call>\n{{"name": "get_weather", "arguments": {LIMA_JSON}}}\n</tool_call>\n{HERMES_NOW}',
        "Let me see.",
        [LIMA, NOW],
    ),
    ("hermes", 'a < b <tool_call>{"name":"now","arguments":{}}</tool_call>', "a < b", [NOW]),
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", [PARIS]),
    (
        "mistral",
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {LIMA_JSON}}}, {{"name": "now", "arguments": {{}}}}]',
        "",
        [LIMA, NOW],
    ),
    ("mistral-args", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', "", [PARIS]),
    ("mistral-args", f"Hm. [TOOL_CALLS]get_weather[ARGS]{LIMA_JSON}[TOOL_CALLS]now[ARGS]{{}}", "Hm.", [LIMA, NOW]),
    ("functionary-3.1", '<function=get_weather>{"city": "Paris"}</function>', "", [PARIS]),
    (
        "functionary-3.1",
        f"So: <function=get_weather>{LIMA_JSON}</function><function=now>{{}}</function>",
        "So:",
        [LIMA, NOW],
    ),
    ("functionary-3.2", 'get_weather\n{"city": "Paris"}', "", [PARIS]),
    ("functionary-3.2", f"all\nI look.\n>>>get_weather\n{LIMA_JSON}>>>now\n{{}}", "I look.", [LIMA, NOW]),
    ("firefunction", 'functools[{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", [PARIS]),
    (
        "firefunction",
        f'Yes. functools[{{"name": "get_weather", "arguments": {LIMA_JSON}}}, {{"name": "now", "arguments": {{}}}}]',
        "Yes.",
        [LIMA, NOW],
    ),
    ("generic", '{"tool_calls": [{"name": "get_weather", "arguments": {"city": "Paris"}}]}', "", [PARIS]),
    (
        "generic",
        f'{{"tool_calls": [{{"name": "get_weather", "arguments": {LIMA_JSON}}}, {{"name": "now", "arguments":{{}}}}]}}',
        "",
        [LIMA, NOW],
    ),
    ("generic", r'{"response": "It is \"warm\" \ud83d\ude00 {}\n"}', 'It is "warm" 😀 {}\n', []),
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
    ("llama-3", "It is 20 degrees; {not} a call.", "It is 20 degrees; {not} a call.", []),
    ("llama-3", '{"nam": 1}', '{"nam": 1}', []),
    ("llama-3", "  \n", "  \n", []),
    ("llama-3", "", "", []),
    ("hermes", "a <tool_cal or <b> \n", "a <tool_cal or <b> \n", []),
    ("hermes", '{"name": "now", "arguments": {}}', '{"name": "now", "arguments": {}}', []),
    ("mistral", "[TOOL] x", "[TOOL] x", []),
    ("functionary-3.1", "<function is a word", "<function is a word", []),
    ("functionary-3.2", "all\nHello >> there\n", "Hello >> there\n", []),
    ("functionary-3.2", "all\n", "", []),
    ("pythonic", "[link](http://x)", "[link](http://x)", []),
    ("pythonic", "[now or never]", "[now or never]", []),
    ("firefunction", "functools is a module", "functools is a module", []),
    ("generic", '{"response": ""}', "", []),
]
WRONG: list[Case] = [
    ("llama-3", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    ("llama-3", '{"name": "now"}', '{"name": "now"}', []),
    ("hermes", "<tool_call>nothing</tool_call> more", "<tool_call>nothing</tool_call> more", []),
    (
        "hermes",
        '<tool_call>{"name": "then", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "then", "arguments": {}}</tool_call>',
        [],
    ),
    ("functionary-3.1", "<function=then>{}</function>", "<function=then>{}</function>", []),
    ("pythonic", "[then()]", "[then()]", []),
    ("generic", "plain words", "plain words", []),
    (
        "generic",
        '{"tool_calls": [{"name": "then", "arguments": {}}]}',
        '{"tool_calls": [{"name": "then", "arguments": {}}]}',
        [],
    ),
]
"""what no grammar of ours lets through; it is text"""
CUT: list[Case] = [
    ("llama-3", '{"name": "get_w', '{"name": "get_w', []),
    ("hermes", 'So. <tool_call>\n{"name": "get_', "So.", []),
    ("hermes", "So. <tool_c", "So. <tool_c", []),
    ("generic", '{"response": "It is', "It is", []),
    ("mistral", '[TOOL_CALLS] [{"name": "now", "argum', "", []),
]
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
            assert delta.id.startswith("call_") and len(delta.id) == 29
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
        '{"response": "',
        "<think>",
        "</think>",
        "x",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.lists(ALPHABET, max_size=12), st.data())
def test_any_split_of_any_text_gives_the_same_parts(family: str, words: list[str], data: st.DataObject) -> None:
    text = "".join(words)
    opened = data.draw(st.booleans())

    def parts_of(pieces: Sequence[str]) -> tuple[str, str, list[tuple[str, str]]]:
        parts = read(ThoughtReader(CallReader(FAMILIES[family], FUNCTIONS), opened=opened), pieces)
        return parts.reasoning, parts.content, calls_of(parts)

    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert parts_of(pieces) == parts_of([text]) == parts_of(list(text))


def test_arguments_are_told_as_they_come() -> None:
    reader = CallReader(FAMILIES["hermes"], FUNCTIONS)
    assert not reader.push('<tool_call>\n{"name": "get_weather", "arguments": ')
    first = reader.push("{")
    assert [delta.arguments for delta in first.calls] == ["", "{"]
    assert [delta.arguments for delta in reader.push('"city": "Pa').calls] == ['"city": "Pa']
    assert [delta.arguments for delta in reader.push('ris"}}\n</tool').calls] == ['ris"}']


def test_text_waits_only_while_it_may_become_a_call() -> None:
    reader = CallReader(FAMILIES["hermes"], FUNCTIONS)
    assert reader.push("Hello <").content == "Hello"
    assert reader.push("b> and").content == " <b> and"
    reader = CallReader(FAMILIES["llama-3"], FUNCTIONS)
    assert reader.push('{"na').content == ""
    assert reader.push("me it").content == '{"name it'


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


@pytest.mark.parametrize("text", [r"\ud83d x", r"\ud83d\ud83d", r"\ud83d", r"\udc00"])
def test_half_a_surrogate_pair_in_an_answer_becomes_text(text: str) -> None:
    told, _ = StringScan().push(text + '"')
    told.encode()


# Thoughts


THOUGHTS = [
    (False, "<think>\nHm.\n\nWell.\n</think>\n\nHello", "Hm.\n\nWell.", "Hello"),
    (True, "Hm <b>.\n</think>\n\nHello \n", "Hm <b>.", "Hello \n"),
    (True, "\n\n</think>\n\nHello", "", "Hello"),
    (True, "cut in the mid</thi", "cut in the mid</thi", ""),
    (False, "Hello <think> no </think>", "", "Hello <think> no </think>"),
    (False, "\n<thing>", "", "\n<thing>"),
    (False, "<thi", "", "<thi"),
    (False, "", "", ""),
]


@pytest.mark.parametrize("opened,text,reasoning,content", THOUGHTS)
def test_thoughts_are_told_apart(opened: bool, text: str, reasoning: str, content: str) -> None:
    for pieces in [[text], *(cut(text, length) for length in QUICK_SPLITS)]:
        parts = read(ThoughtReader(PlainReader(), opened=opened), pieces)
        assert (parts.reasoning, parts.content) == (reasoning, content), pieces


def test_a_call_in_thoughts_is_a_thought() -> None:
    text = f"I could {HERMES_NOW}</think>\n{HERMES_NOW}"
    for pieces in ([text], list(text)):
        parts = read(ThoughtReader(CallReader(FAMILIES["hermes"], FUNCTIONS), opened=True), pieces)
        assert "tool_call" in parts.reasoning and parts.content == "" and calls_of(parts) == [("now", "{}")]


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
    [(), CONTROL, [*CONTROL, "<tool_call>", "</tool_call>", "<think>", "</think>"]],
    ids=["text", "control", "more"],
)
@pytest.mark.parametrize("thoughts", ["none", "possible", "begun"])
@pytest.mark.parametrize("family", FAMILIES)
def test_grammars_allow_what_families_write(family: str, thoughts: Thoughts, control: Sequence[str]) -> None:
    words, vocabulary = vocabularies(control)
    auto = write(FAMILIES[family], words, Demand(FUNCTIONS, thoughts=thoughts), grammars.embedded)
    forced = write(FAMILIES[family], words, Demand(FUNCTIONS, must_call=True, thoughts=thoughts), grammars.embedded)
    single = write(FAMILIES[family], words, Demand(FUNCTIONS, many=False, thoughts=thoughts), grammars.embedded)
    befores = {
        "none": [""],
        "possible": ["", "<think>\nHm [now( {\n</think>\n\n"],
        "begun": ["Hm.</think>\n\n", "</think>"],
    }[thoughts]
    if FAMILIES[family].prompted and thoughts != "none":
        return  # its prompt has no room for thoughts
    for name, text, content, calls in CALLS + TEXTS:
        spelled = FAMILIES[family]
        if name != family or any(
            mark in text and mark not in control for mark in (spelled.also, spelled.also_closing) if mark
        ):
            continue
        for before in befores:
            assert accepts(words, vocabulary, auto, before + text), (before, text)
            assert accepts(words, vocabulary, single, before + text) == (len(calls) < 2), (before, text)
            alone = bool(calls) and not content
            assert accepts(words, vocabulary, forced, before + text) == alone, (before, text)


BAD_ARGUMENTS = [
    ("llama-3", '{"name": "get_weather", "parameters": {"town": "Paris"}}'),
    ("llama-3", '{"name": "get_wether", "parameters": {"city": "Paris"}}'),
    ("llama-3", '{"name": "get_weather", "parameters": {"city": "Paris"}} and more'),
    ("llama-3", '{"name": "get_weather", "parameters": {"city":     "Paris"}}'),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": 1}}\n</tool_call>'),
    ("hermes", "Well <tool_call> hm"),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "x", "where": [1, 2, 3]}}\n</tool_call>'),
    ("mistral", "[TOOL_CALLS] []"),
    ("functionary-3.1", "<function=get_weather>{}</function>"),
    ("functionary-3.2", "get_weather\n{}"),
    ("functionary-3.2", "Hello"),
    ("pythonic", "[get_weather(days=2)]"),
    ("pythonic", "[get_weather(city=Paris)]"),
    ("pythonic", "[now(x=1)]"),
    ("generic", "Hello"),
    ("generic", '{"tool_calls": []}'),
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
    text = next(text for name, text, content, calls in CALLS if name == family and len(calls) == 1)
    assert accepts(words, vocabulary, lark, text)


def test_a_control_token_has_a_name_for_grammars() -> None:
    assert control_name("<|python_tag|>") == "<|python_tag|>" and control_name("[TOOL_CALLS]") == "<|TOOL_CALLS|>"


@pytest.mark.parametrize(
    "template,family",
    [
        ('{{ tools }} <|python_tag|> {"name": .., "parameters": ..}', "llama-3"),
        ("{{ tools }} <tool_call>", "hermes"),
        ("{{ tools }} [TOOL_CALLS]", "mistral"),
        ("{{ tools }} [TOOL_CALLS] [ARGS]", "mistral-args"),
        ("{{ tools }} <function=", "functionary-3.1"),
        ("{{ tools }} >>>all", "functionary-3.2"),
        ("{{ tools }} [func_name1(params_name1=params_value1)]", "pythonic"),
        ("{{ tools }} functools[", "firefunction"),
        ("{{ tools }} <tool_call><function=..><parameter=..>", "generic"),
        ("{{ tools }} something else", "generic"),
    ],
)
def test_the_family_is_seen_in_the_template(template: str, family: str) -> None:
    words = Words([])
    assert family_of(template, True, words) == family
    assert family_of(template, False, words) == "generic"
