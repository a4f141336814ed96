"""300 JSON schemas: what may be written is valid, what is valid may be written, what is refused is named."""

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
from gptq_api.grammar.compile import json_schema, limits, where_refused
from gptq_api.grammar.vocabulary import vocabulary
from gptq_api.text.tokenizer import load_tokenizer
from tests.support.schemas import Case, Refusal, cases, refusals, spoiled, validator

CASES = list(cases(231))
REFUSALS = list(refusals(69))
MAX_TOKENS = 400
END = 1
CLOSING = ['"', "}", "]", '"}', '"]', ":", ",", "null", "0", "1", "@", "a", "c"]


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return vocabulary(load_tokenizer(Path(demo.__file__).parent / "model"), 2048, [END])


def matcher(tokenizer: LLTokenizer, case: Case) -> LLMatcher:
    found = LLMatcher(tokenizer, json_schema(case.schema), limits=limits(), log_level=0)
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
            allowed = [END] if END in allowed else [i for i in closing if i in set(allowed)] or allowed
        token = random.choice(allowed)
        if token == END:
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
    error = LLMatcher.validate_grammar(json_schema(refusal.schema), limits=limits())
    assert f"'{refusal.word}'" in where_refused(refusal.schema, error), error


def test_all_kinds_are_there() -> None:
    assert len(CASES) + len(REFUSALS) == 300
    assert min(Counter(case.name.split("-")[0] for case in CASES).values()) >= 10
