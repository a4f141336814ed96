"""Answers with tools: what a grammar lets through, for every family."""

from __future__ import annotations

from typing import Any

import pytest
from llguidance import LLMatcher

from gptq_api.grammar import compile as grammars
from gptq_api.grammar.vocabulary import byte_vocabulary
from gptq_api.text.tools.grammar import Function, answer_grammar
from gptq_api.text.tools.layouts import GENERIC, HERMES, LLAMA_3, MISTRAL, CallLayout
from tests.text.tools.test_reader import written

MARK = "[TOOL_CALLS]"
MARK_ID = 257
VOCABULARY = byte_vocabulary([MARK])
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTIONS = [
    Function("weather", grammars.inner_schema(CITY)),
    Function("now", grammars.inner_schema({"type": "object", "additionalProperties": False})),
]
RIGHT, NOW = ("weather", '{"city": "Paris"}'), ("now", "{}")
LAYOUTS = {layout.name: layout for layout in (HERMES, LLAMA_3, MISTRAL, GENERIC)}


def accepts(layout: CallLayout, text: str, **how: Any) -> bool:
    token = MARK_ID if layout is MISTRAL else None
    how = {"forced": False, "many": True, **how}
    grammar = grammars.lark(answer_grammar(layout, FUNCTIONS, begin_token=token, **how))
    matcher = LLMatcher(VOCABULARY, grammar, limits=grammars.limits())
    assert not matcher.is_error(), matcher.get_error()
    first, *rest = text.split(MARK) if token else [text]
    ids = list(first.encode())
    for part in rest:
        ids += [MARK_ID, *part.encode()]
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("name", LAYOUTS)
def test_auto(name: str) -> None:
    layout = LAYOUTS[name]
    for text in ("", "Hello\nworld", '{"a": 1}', "a < b <tool_ca", written(layout, RIGHT), written(layout, RIGHT, NOW)):
        assert accepts(layout, text), text
    wrong = [written(layout, ("other", "{}")), written(layout, ("weather", "{}")), written(layout, NOW) + "x"]
    for text in wrong:
        assert not accepts(layout, text), text
    assert not accepts(layout, written(layout, RIGHT, NOW), many=False)
    if layout.begin:
        assert accepts(layout, "I see. " + written(layout, RIGHT))


def test_white_space_may_differ() -> None:
    for text in (
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
        '<tool_call>\n{"name":"now","arguments":{}}</tool_call>',
        '<tool_call>\n{\n  "name": "now",\n  "arguments": {}\n}\n</tool_call>',
    ):
        assert accepts(HERMES, text) and accepts(HERMES, text, forced=True), text
    assert not accepts(HERMES, '<tool_call>\n\n\n{"name": "now", "arguments": {}}\n</tool_call>')
    assert accepts(LLAMA_3, '{"name":"now","parameters":{}}')
    assert not accepts(LLAMA_3, '{"name":"other","parameters":{}}')


@pytest.mark.parametrize("name", LAYOUTS)
def test_forced(name: str) -> None:
    layout = LAYOUTS[name]
    assert accepts(layout, written(layout, RIGHT), forced=True)
    assert accepts(layout, written(layout, NOW, RIGHT), forced=True)
    for text in ("", "Hello", "I see. " + written(layout, RIGHT)):
        assert not accepts(layout, text, forced=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_words_of_a_schema(name: str) -> None:
    layout = LAYOUTS[name]
    schema = grammars.inner_schema({"type": "array", "items": {"type": "integer"}})
    assert accepts(layout, "[1, 2]", text_schema=schema)
    assert accepts(layout, written(layout, RIGHT), text_schema=schema)
    assert not accepts(layout, "Hello", text_schema=schema)


@pytest.mark.parametrize("name", LAYOUTS)
def test_behind_thoughts(name: str) -> None:
    layout = LAYOUTS[name]
    assert accepts(layout, "hm <b></think>\n\n" + written(layout, RIGHT), thoughts=True, forced=True)
    assert accepts(layout, "hm</think>yes", thoughts=True)
    assert not accepts(layout, written(layout, RIGHT), thoughts=True, forced=True)
