"""300 JSON schemas: what llguidance lets through is valid, what it refuses it names."""

from __future__ import annotations

import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from gptq_api import demo
from tests.support.schemas import Case, Refusal, cases, refusals, spoiled, validator

CASES = list(cases(231))
REFUSALS = list(refusals(69))
MAX_TOKENS = 400
CLOSING = ['"', "}", "]", '"}', '"]', ":", ",", "null", "0", "1", "@", "a", "c"]
WITHOUT_ITS_NAME = {"pattern": "regex", "$ref": "'"}
"""keyword -> what llguidance's own words for it hold: a wrong pattern and a missing reference are quoted"""


def compiled(schema: dict[str, Any]) -> str:
    whitespace = {"whitespace_pattern": r"[ ]|\n[ ]{0,16}"}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=whitespace)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    folder = Path(demo.__file__).parent / "model"
    return LLTokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"), eos_token=1)


def matcher(tokenizer: LLTokenizer, case: Case) -> LLMatcher:
    found = LLMatcher(tokenizer, compiled(case.schema), log_level=0)
    assert not found.is_error(), (found.get_error(), case.schema)
    return found


def walk(tokenizer: LLTokenizer, start: LLMatcher, random: Random, patience: int) -> str | None:
    """What a model that knows nothing would write, any allowed token as likely as another; after `patience` tokens one
    that wants to end. None where it does not in MAX_TOKENS."""
    closing = [ids[0] for text in CLOSING if len(ids := tokenizer.tokenize_str(text)) == 1]
    now, tokens = start.deep_copy(), list[int]()
    while len(tokens) < MAX_TOKENS:
        mask = now.compute_logit_bias()
        allowed = [i for i, bias in enumerate(mask) if bias]
        assert allowed, now.get_error()
        if len(tokens) >= patience:
            allowed = [1] if 1 in allowed else [i for i in closing if i in set(allowed)] or allowed
        token = random.choice(allowed)
        if token == 1:
            return tokenizer.decode_bytes(tokens).decode()
        assert now.consume_token(token), now.get_error()
        tokens.append(token)
    return None


def accepts(tokenizer: LLTokenizer, start: LLMatcher, text: str) -> bool:
    now = start.deep_copy()
    tokens = tokenizer.tokenize_str(text)
    return now.try_consume_tokens(tokens) == len(tokens) and now.is_accepting()


def exact(text: str) -> Any:
    return json.loads(text, parse_float=Decimal)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_text_that_may_be_written_is_valid(case: Case, tokenizer: LLTokenizer) -> None:
    checker, start = validator(case.schema), matcher(tokenizer, case)
    finished = 0
    for seed in range(4):
        text = walk(tokenizer, start, Random(seed), patience=10 * seed)
        if text is not None:
            finished += 1
            checker.validate(exact(text))
    assert finished


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_valid_documents_may_be_written_and_invalid_ones_may_not(case: Case, tokenizer: LLTokenizer) -> None:
    checker, start = validator(case.schema), matcher(tokenizer, case)
    random = Random(7)
    for _ in range(12):
        document = case.make(random)
        text = json.dumps(document, ensure_ascii=False)
        checker.validate(exact(text))
        assert accepts(tokenizer, start, text), text
        text = json.dumps(spoiled(document, random), ensure_ascii=False)
        if not checker.is_valid(exact(text)):
            assert not accepts(tokenizer, start, text), text


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_a_refusal_names_its_keyword(refusal: Refusal) -> None:
    error = LLMatcher.validate_grammar(compiled(refusal.schema))
    assert refusal.word in error or WITHOUT_ITS_NAME.get(refusal.word, "nothing") in error, error


def test_all_kinds_are_there() -> None:
    assert len(CASES) + len(REFUSALS) == 300
    assert min(Counter(case.name.split("-")[0] for case in CASES).values()) >= 10
