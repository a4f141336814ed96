"""Whatever a body gets wrong is told in our words, with the place it is at."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from gptq_api.api.app import ROUTERS
from gptq_api.api.invalid import _REASONS, Invalid, first_invalid

BODIES: dict[str, type[BaseModel]] = {
    route.path: route.dependant.body_params[0].field_info.annotation  # type: ignore[misc]
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute) and route.dependant.body_params
}
"""the class of each route's body, by its path"""
WRONG: list[Any] = [
    *(None, True, -1, 1.5, 2**31, 2**70, float("nan"), "", "x", "\ud800", "x" * 9 * 2**20, [], {}),
    *([None], [1], ["x"], [[]], [{}], ["x"] * 5000, {"x": None}, {"x": 1}, {"x": {}}, {"\ud800": 1}, {"5": "x"}),
    *({"type": "x"}, [{"type": "x"}], [{"role": "x"}], [{"role": "user"}], [{"role": "user", "content": 1}]),
    {str(i): i for i in range(2000)},
]
THEIRS = re.compile(
    r"input should|valid|after validation|\[key\]|function-|constrained|pydantic|extra inputs|literal\["
)


def told(kind: type[BaseModel], body: Any) -> tuple[Invalid, str] | None:
    """What is said of a body and the validator's own name for it; None where the body is fine."""
    try:
        kind.model_validate(body)
    except ValidationError as error:
        errors = [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]
        return first_invalid(errors, body), str(errors[0]["type"])
    return None


@pytest.mark.parametrize("path", sorted(BODIES))
def test_every_field_in_our_words(path: str) -> None:
    kind = BODIES[path]
    num_refused = 0
    for field in kind.model_fields:
        for value in WRONG:
            found = told(kind, {field: value})
            if found is None or found[0].code == "missing_required_parameter":
                continue
            num_refused += 1
            (param, reason, _), name = found
            assert param is not None and re.split(r"[.\[]", param)[0] == field, (field, str(value)[:40], param)
            assert not THEIRS.search(reason.lower()), reason
            assert name in _REASONS, f"no words of ours for {name}"
    assert num_refused > 3


class Leaf(BaseModel):
    kind: str
    size: int


class Tree(BaseModel):
    """Every way a place can be told that is not in the body."""

    either: str | Leaf | list[Leaf] = ""
    bias: dict[str, float] = {}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"either": 5}, "either"),
        ({"either": {"kind": "x"}}, "either.size"),
        ({"either": {"kind": "x", "size": "y"}}, "either.size"),
        ({"either": [{"kind": "x", "size": 1}, {"kind": "x", "size": "y"}]}, "either[1].size"),
        ({"bias": {"a": "x"}}, "bias.a"),
        ([], None),
    ],
)
def test_the_place_is_one_in_the_body(body: Any, param: str | None) -> None:
    found = told(Tree, body)
    assert found is not None and found[0].param == param


def test_bounds_are_written_as_people_do() -> None:
    path = "/v1/chat/completions"
    messages = [{"role": "user", "content": "x"}]
    for fields, said in (
        ({"temperature": 3}, "it must be at most 2, got 3"),
        ({"repetition_penalty": 0}, "it must be at least 0.01, got 0"),
        ({"logit_bias": {"foo": 1}}, "its key must be a token id, in digits"),
        ({"stop_token_ids": [1] * 200}, "it may hold at most 128 entries, got an array"),
    ):
        found = told(BODIES[path], {"messages": messages, **fields})
        assert found is not None and found[0].reason == said
