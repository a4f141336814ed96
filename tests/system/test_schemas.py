"""Every ninth of the schemas in tests/grammar/test_schemas.py, through a real server with the demo model."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from tests.support.schemas import Case, Refusal, cases, refusals, validator
from tests.support.server import Server, check_error


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "made", "schema": schema, "strict": True}}


@pytest.mark.parametrize("case", list(cases(231))[::9], ids=lambda case: case.name)
def test_an_answer_validates(case: Case, server: Server) -> None:
    checker = validator(case.schema)
    answer = server.chat("Say it.", response_format=form(case.schema), max_tokens=200, n=3, seed=5).json()
    for choice in answer["choices"]:
        if choice["finish_reason"] == "stop":
            checker.validate(json.loads(choice["message"]["content"], parse_float=Decimal))
        else:
            assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("refusal", list(refusals(69))[::5], ids=lambda refusal: refusal.name)
def test_a_refusal_names_its_keyword(refusal: Refusal, server: Server) -> None:
    response = server.chat("Say it.", response_format=form(refusal.schema), max_tokens=4)
    error = check_error(response, 400, "response_format.json_schema.schema")
    assert f"'{refusal.word}'" in error["message"]
