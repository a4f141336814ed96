"""Whatever a body gets wrong is told in our words, with the place it is at."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from gptq_api.api.app import ROUTERS
from gptq_api.api.errors import ApiError, invalid_body
from gptq_api.api.invalid import _REASONS, Invalid, first_invalid
from gptq_api.api.requests.refused import INSTEAD, refuse
from gptq_api.api.unknown_url import unknown_url

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
        ({"messages": []}, "it must not be empty"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "'assistant' or 'tool', got 'bot'"),
        ({"messages": [{"role": "my secret", "content": "x"}]}, "'assistant' or 'tool', got a string"),
    ):
        found = told(BODIES[path], {"messages": messages, **fields})
        assert found is not None and found[0].reason.endswith(said)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/chat/completions", {"prompt": "x"}, "'messages'. A body with 'prompt' is for /v1/completions."),
        ("/v1/chat/completions", {"input": "x"}, "'messages'. A body with 'input' is for /v1/responses."),
        ("/v1/completions", {"messages": []}, "'prompt'. A body with 'messages' is for /v1/chat/completions."),
        ("/v1/chat/completions", {}, "'messages'."),
    ],
)
def test_a_body_for_another_route_is_told_so(path: str, body: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        BODIES[path].model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in refused.value.errors()]
    assert str(invalid_body(errors, body).error["message"]) == f"Missing required parameter: {said}"


@pytest.mark.parametrize("name", INSTEAD)
def test_what_is_refused_and_there_by_another_name_has_that_name(name: str) -> None:
    with pytest.raises(ApiError) as refused:
        refuse({name: 5})
    assert str(refused.value.error["message"]).endswith(f"which has '{INSTEAD[name]}' instead; leave it out.")
    assert any(INSTEAD[name].split(".")[0] in kind.model_fields for kind in BODIES.values())


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/api/chat", "is Ollama's; OpenAI's API is here: /v1/chat/completions"),
        ("/api/tags", "is Ollama's"),
        ("/generate", "This is OpenAI's API"),
        ("/v1/realtime", "no realtime sessions"),
        ("/openai/v1/chat/completions", "Did you mean /v1/chat/completions?"),
        ("/v1/embeddings", "computes no embeddings"),
        ("/nothing", "The API begins with /v1; /docs and /openapi.json list all there is."),
    ],
)
def test_a_place_that_is_not_here_has_a_hint(path: str, said: str) -> None:
    known = ["/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/"]
    assert said in unknown_url("POST", path, known)[0]
