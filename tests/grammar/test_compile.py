"""Grammars as they are written down, and refusals that name keyword and place."""

from __future__ import annotations

from typing import Any

import pytest
from llguidance import LLMatcher

from gptq_api.grammar import compile as grammars
from gptq_api.grammar.vocabulary import byte_vocabulary

VOCABULARY = byte_vocabulary(["<|call|>"])
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name", "tags"],
    "additionalProperties": False,
}


def accepts(grammar: str, text: str) -> bool:
    """Whether the whole text is one of the grammar."""
    matcher = LLMatcher(VOCABULARY, grammar, limits=grammars.limits())
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


@pytest.mark.parametrize(
    "text",
    [
        '{"name":"a","tags":[1,2]}',
        '{"name": "é", "tags": []}',
        '{\n    "name": "a",\n    "tags": [\n        1\n    ]\n}',
    ],
)
def test_usual_layouts_of_json_are_allowed(text: str) -> None:
    assert accepts(grammars.json_schema(PERSON), text)


@pytest.mark.parametrize(
    "text",
    [
        '{\n\n"name":"a","tags":[]}',
        '{  "name":"a","tags":[]}',
        ' {"name":"a","tags":[]}',
        '{"name":"a","tags":[]}\n',
        '{"name":"a"}',
        '{"name":"a","tags":["1"]}',
    ],
)
def test_white_space_is_bounded_and_the_schema_holds(text: str) -> None:
    assert not accepts(grammars.json_schema(PERSON), text)


def test_a_choice_is_taken_literally() -> None:
    texts = ["a.b", "c|d", " ü\n", "[x]{2}", "\\d", "-&~#", "/"]
    grammar = grammars.choice(texts)
    for text in texts:
        assert accepts(grammar, text)
    assert not accepts(grammar, "axb")
    assert not accepts(grammar, "7")


def test_gbnf_is_translated() -> None:
    assert accepts(grammars.lark('root ::= "a" [0-9]+'), "a12")
    assert accepts(grammars.lark('start: "a" /[0-9]+/'), "a12")


def test_control_tokens_have_names() -> None:
    matcher = LLMatcher(VOCABULARY, grammars.lark("start: <|call|>"), limits=grammars.limits())
    assert matcher.try_consume_tokens([257]) == 1 and matcher.is_accepting()


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        ({"properties": {"a": {"items": {"uniqueItems": True}}}}, ["uniqueItems", "/properties/a/items"]),
        ({"$defs": {"x/y": {"not": {}}}, "$ref": "#/$defs/x~1y"}, ["'not'", "/$defs/x~1y"]),
        ({"properties": {"a": {"format": "klingon"}}}, ["format", "/properties/a", "klingon"]),
        ({"items": {"type": "text"}}, ["type", "/items", "text"]),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, ["$ref", "/properties/a"]),
        ({"properties": {"a": {"type": "string", "pattern": "(?=b)"}}}, ["pattern", "/properties/a", "look-around"]),
        ({"anyOf": [{"oneOf": [{"type": "string"}, {"maxLength": 3}]}]}, ["oneOf", "/anyOf/0", "anyOf"]),
        ({"properties": {"not": {"type": "string"}, "b": {"not": {}}}}, ["'not'", "/properties/b"]),
    ],
)
def test_refusals_name_keyword_and_place(schema: dict[str, Any], names: list[str]) -> None:
    matcher = LLMatcher(VOCABULARY, grammars.json_schema(schema), limits=grammars.limits(), log_level=0)
    why = grammars.where_refused(schema, matcher.get_error())
    assert all(name in why for name in names), why


def test_what_is_too_large_or_no_schema_names_the_limit() -> None:
    deep: Any = {}
    for _ in range(70):
        deep = {"items": deep}
    with pytest.raises(grammars.GrammarError, match="64"):
        grammars.json_schema(deep)
    with pytest.raises(grammars.GrammarError, match=str(grammars.MAX_GRAMMAR_BYTES)):
        grammars.json_schema({"enum": ["x" * 300_000]})
    with pytest.raises(grammars.GrammarError, match="x-guidance"):
        grammars.json_schema({"x-guidance": {"lenient": True}, "not": {}})
    with pytest.raises(grammars.GrammarError, match="object"):
        grammars.json_schema([])


def test_two_properties_of_one_name_do_not_count_as_two() -> None:
    numbers = {"type": "object", "additionalProperties": {"type": "integer"}}
    nested = {"type": "object", "properties": {"a": {**numbers, "minProperties": 2}}}
    with pytest.raises(grammars.GrammarError, match="'minProperties' 2 at /properties/a: "):
        grammars.json_schema(nested)
    for enough in ({"minProperties": 1}, {"minProperties": 2, "required": ["a"]}):
        grammar = grammars.json_schema({**numbers, **enough})
        assert accepts(grammar, '{"a": 1, "b": 2}')
        assert not accepts(grammar, "{}")
