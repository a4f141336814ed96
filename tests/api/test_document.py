"""Every route declares what it answers, before any server runs."""

from __future__ import annotations

import json
import re

import pytest
from fastapi.routing import APIRoute
from jsonschema import Draft202012Validator

from gptq_api.api.app import ROUTERS, WITH_A_FOLDER
from gptq_api.api.document.openapi import openapi_document
from gptq_api.api.document.shapes import SHAPES

ROUTES = [route for router in (*ROUTERS, *WITH_A_FOLDER) for route in router.routes if isinstance(route, APIRoute)]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_a_route_declares_its_answers(route: APIRoute) -> None:
    """`**answers("NameOfTheShape")` in the route's decorator, the shape in api/document/."""
    assert route.include_in_schema and 200 in route.responses, "no answers(...)"
    assert route.responses[200]["content"]
    if route.body_field is not None or route.openapi_extra:
        assert {400, 408, 413, 415} <= route.responses.keys(), "what reading a body can come to"


def test_every_shape_is_a_schema_that_somebody_answers() -> None:
    for schema in SHAPES.values():
        Draft202012Validator.check_schema(schema)
    document = openapi_document(ROUTES, {"/health"}, title="x", version="1", keyed=True, any_model=False)
    used = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert SHAPES.keys() <= used and used <= document["components"]["schemas"].keys()


def test_keys_are_asked_for_only_where_there_are_some() -> None:
    document = openapi_document(ROUTES, {"/health", "/ready"}, title="x", version="1", keyed=True, any_model=False)
    assert document["components"]["securitySchemes"].keys() == {"bearer", "x-api-key"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            asks = path not in ("/health", "/ready")
            assert ("security" in operation) == asks and ("401" in operation["responses"]) == asks
    open_to_all = openapi_document(ROUTES, {"/health", "/ready"}, title="x", version="1", keyed=False, any_model=False)
    assert "securitySchemes" not in open_to_all["components"] and '"401"' not in json.dumps(open_to_all)


def test_numbers_are_those_that_are_meant() -> None:
    """The framework makes floats of bounds, and the largest seed is none."""
    schemas = openapi_document(ROUTES, (), title="x", version="1", keyed=False, any_model=False)["components"][
        "schemas"
    ]
    seed = schemas["ChatCompletionRequest"]["properties"]["seed"]["anyOf"][0]
    assert (seed["minimum"], seed["maximum"]) == (-(2**63), 2**63 - 1)
    assert not re.search(r"\d\.0\b|e\+", json.dumps(schemas))


def test_no_model_is_unknown_where_any_is_accepted() -> None:
    document = openapi_document(ROUTES, (), title="x", version="1", keyed=False, any_model=True)
    kept = {path for path in document["paths"] if path.startswith(("/v1/files", "/v1/batches"))}
    others = {path: operations for path, operations in document["paths"].items() if path not in kept}
    assert '"404"' not in json.dumps(others) and len(kept) == 6, "what was kept may be gone"
