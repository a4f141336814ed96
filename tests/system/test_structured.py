"""Structured output over HTTP, with the demo model."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from tests.support.server import Server, chat_body, stream_chunks

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def by_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, **more}}


@pytest.mark.parametrize("temperature", [0, 1.7])
def test_every_choice_is_valid(server: Server, temperature: float) -> None:
    answer = server.chat(
        "Hello", response_format=by_schema(PERSON, strict=True), n=4, temperature=temperature, seed=5, max_tokens=200
    ).json()
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)


def test_streamed_as_whole(server: Server) -> None:
    fields: dict[str, Any] = {"response_format": by_schema(PERSON), "seed": 2, "max_tokens": 200, "logprobs": True}
    whole = server.chat("Hello", **fields).json()["choices"][0]
    chunks = [chunk["choices"][0] for chunk in stream_chunks(server, chat_body("Hello", **fields))]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole["message"]["content"]
    assert chunks[-1]["finish_reason"] == "stop"
    said = "".join(entry["token"] for entry in whole["logprobs"]["content"])
    assert said == whole["message"]["content"]


def test_a_length_says_so(server: Server) -> None:
    choice = server.chat("Hello", response_format=by_schema(PERSON), max_tokens=5).json()["choices"][0]
    assert choice["finish_reason"] == "length"


def test_any_object(server: Server) -> None:
    shape = {"type": "json_object"}
    for seed in range(4):
        choice = server.chat("Hello", response_format=shape, seed=seed, max_tokens=400).json()["choices"][0]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_other_kinds(server: Server, path: str) -> None:
    prompt: dict[str, Any] = (
        {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    )

    def texts(structured: dict[str, Any]) -> list[str]:
        body = prompt | {"structured_outputs": structured, "n": 4, "seed": 3, "max_tokens": 300, "temperature": 1.5}
        answer = server.post(path, body).json()
        assert all(choice["finish_reason"] == "stop" for choice in answer["choices"]), answer
        return [choice.get("text", (choice.get("message") or {}).get("content")) for choice in answer["choices"]]

    assert set(texts({"choice": ["red one", " blue\n", "grün ☃"]})) <= {"red one", " blue\n", "grün ☃"}
    assert all(re.fullmatch("[a-f]{3}-[0-9]{2}", text) for text in texts({"regex": "[a-f]{3}-[0-9]{2}"}))
    assert all(re.fullmatch("yes|no+", text) for text in texts({"grammar": 'start: "yes" | "n" /o{1,3}/'}))
    assert all(re.fullmatch("a[0-9]", text) for text in texts({"grammar": 'root ::= "a" [0-9]'}))
    for text in texts({"json": PERSON}):
        jsonschema.validate(json.loads(text), PERSON)


def test_stop_texts_and_min_tokens_hold(server: Server) -> None:
    structured = {"regex": "x{1,40}"}
    choice = server.chat("Hello", structured_outputs=structured, min_tokens=12, max_tokens=60).json()
    assert choice["usage"]["completion_tokens"] >= 12
    choice = server.chat("Hello", structured_outputs={"regex": "abc-def"}, stop=["-"]).json()["choices"][0]
    assert choice["message"]["content"] == "abc"


@pytest.mark.parametrize(
    ("fields", "param", "names"),
    [
        (
            {"response_format": by_schema({"properties": {"a": {"uniqueItems": True}}})},
            "response_format.json_schema.schema",
            ["uniqueItems", "/properties/a"],
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", ["json_schema"]),
        ({"response_format": {"type": "xml"}}, "response_format.type", ["json_object"]),
        ({"structured_outputs": {}}, "structured_outputs", ["regex"]),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", ["one"]),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", ["unclosed"]),
        ({"structured_outputs": {"grammar": "nonsense ("}}, "structured_outputs.grammar", ["read"]),
        ({"structured_outputs": {"grammar": "start: <|none|>"}}, "structured_outputs.grammar", ["<|none|>"]),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", ["response_format"]),
        ({"structured_outputs": {"json": {"enum": ["x" * 300_000]}}}, "structured_outputs.json", ["262144"]),
        ({"response_format": by_schema({"x-guidance": {"lenient": True}})}, None, ["x-guidance"]),
    ],
)
def test_refusals_say_where_and_why(
    server: Server, fields: dict[str, Any], param: str | None, names: list[str]
) -> None:
    answer = server.chat("Hello", **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert param is None or error["param"] == param
    assert all(name in error["message"] for name in names), error


def test_unknown_fields_are_named(server: Server) -> None:
    answer = server.chat("Hello", response_format={**by_schema({"type": "null"}, foo=1), "bar": 2}, max_tokens=5)
    assert answer.json()["choices"][0]["message"]["content"] == "null"
    named = answer.headers["x-unsupported-params"]
    assert "response_format.bar" in named and "response_format.json_schema.foo" in named


def test_deeply_nested_documents_end(server: Server) -> None:
    schema = {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}
    answer = server.chat("Hello", response_format=by_schema(schema), max_tokens=300, logit_bias={}, temperature=2)
    assert answer.status_code == 200
