"""Answers held against /openapi.json."""

from __future__ import annotations

import json
from typing import Any

import httpx
from jsonschema import Draft202012Validator

Document = dict[str, Any]


def validate(document: Document, schema: dict[str, Any], value: Any) -> None:
    """AssertionError with the first thing that is wrong."""
    validator = Draft202012Validator({**schema, "components": document["components"]})
    error = next(validator.iter_errors(value), None)
    assert error is None, f"{error.json_path}: {error.message[:300]}"


def check_documented(document: Document, path: str, answer: httpx.Response) -> None:
    """Status, media type, headers and body of an answer are what the document says. `path`: as it stands there."""
    operation = document["paths"][path][answer.request.method.lower()]
    assert str(answer.status_code) in operation["responses"], (path, answer.status_code, answer.text[:300])
    said = operation["responses"][str(answer.status_code)]
    for name, header in said["headers"].items():
        resolved = document["components"]["headers"][name] if "$ref" in header else header
        assert name in answer.headers or not resolved.get("required"), name
    kind = answer.headers["content-type"]
    if kind.startswith("text/event-stream"):
        check_events(document, said["content"]["text/event-stream"], answer.text)
    elif answer.request.method != "HEAD":
        body = answer.json() if kind == "application/json" else answer.text
        validate(document, said["content"][kind]["schema"], body)


def check_events(document: Document, media: dict[str, Any], text: str) -> None:
    """Every event of a stream has the shape of its item, its data that of the content."""
    data = media["itemSchema"]["properties"]["data"]
    assert data["contentMediaType"] == "application/json"
    events = text.removesuffix("\n\n").split("\n\n")
    assert len(events) > 1
    for event in events:
        lines = [line.removeprefix("data: ") for line in event.split("\n") if line.startswith("data: ")]
        if lines and lines != ["[DONE]"]:
            validate(document, data["contentSchema"], json.loads("\n".join(lines)))
