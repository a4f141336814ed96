"""Tools over HTTP, with the demo model, which knows nothing of them."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from tests.support.server import Server, chat_body, check_error, stream_chunks

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 10},
        "days": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}


def test_calls_can_be_forced(server: Server) -> None:
    for seed in range(6):
        choice = server.chat("Hello", tools=TOOLS, tool_choice="required", seed=seed, max_tokens=300).json()["choices"][
            0
        ]
        if choice["finish_reason"] == "length":
            continue
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        for call in choice["message"]["tool_calls"]:
            arguments = json.loads(call["function"]["arguments"])
            schema = WEATHER if call["function"]["name"] == "weather" else {"maxProperties": 0}
            jsonschema.validate(arguments, schema)
            assert call["type"] == "function" and len(call["id"]) == 29


def test_a_function_can_be_named(server: Server) -> None:
    choice = server.chat("Hello", tools=TOOLS, tool_choice=NAMED, max_tokens=300).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER)


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_stream_tells_the_same(server: Server, logprobs: bool) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "seed": 7, "max_tokens": 300}
    fields |= {"parallel_tool_calls": False, "logprobs": logprobs}
    whole = server.chat("Hello", **fields).json()["choices"][0]
    first, *rest = [chunk["choices"][0] for chunk in stream_chunks(server, chat_body("Hello", **fields))]
    assert first["delta"] == {"role": "assistant", "content": None}
    assert rest[-1]["delta"] == {} and rest[-1]["finish_reason"] == "tool_calls"
    deltas = [chunk["delta"]["tool_calls"][0] for chunk in rest[:-1]]
    (call,) = whole["message"]["tool_calls"]
    assert deltas[0]["function"] == {"name": call["function"]["name"], "arguments": ""}
    assert deltas[0]["type"] == "function" and all(set(d) == {"index", "function"} for d in deltas[1:])
    assert "".join(delta["function"]["arguments"] for delta in deltas) == call["function"]["arguments"]
    told = [entry for chunk in rest if chunk["logprobs"] for entry in chunk["logprobs"]["content"]]
    assert [entry["token"] for entry in told] == [e["token"] for e in (whole["logprobs"] or {"content": []})["content"]]
    assert bool(told) == logprobs


def test_a_result_comes_back(server: Server) -> None:
    message = server.chat("Hello", tools=TOOLS, tool_choice=NAMED, max_tokens=300).json()["choices"][0]["message"]
    call = message["tool_calls"][0]
    messages = [
        {"role": "user", "content": "Hello"},
        message,
        {"role": "tool", "tool_call_id": call["id"], "content": "sunny"},
    ]
    prompt = server.post("/apply-template", {"messages": messages, "tools": TOOLS}).json()["prompt"]
    assert "sunny" in prompt and call["function"]["arguments"] in prompt and '"description": "of a city"' in prompt
    answer = server.post("/v1/chat/completions", {"messages": messages, "tools": TOOLS, "max_tokens": 5})
    assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_words_stay_words(server: Server) -> None:
    plain = server.chat("Hello", max_tokens=30).json()["choices"][0]
    without = server.chat("Hello", tools=[], max_tokens=30).json()["choices"][0]
    assert plain == without
    none = server.chat("Hello", tools=TOOLS, tool_choice="none", max_tokens=30).json()["choices"][0]
    auto = server.chat("Hello", tools=TOOLS, max_tokens=30).json()["choices"][0]
    assert none["message"] == auto["message"] and "tool_calls" not in auto["message"]


def test_words_obey_a_format_beside_tools(server: Server) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": WEATHER}}
    choice = server.chat("Hello", tools=TOOLS, response_format=shape, max_tokens=300).json()["choices"][0]
    if not choice["message"].get("tool_calls"):
        jsonschema.validate(json.loads(choice["message"]["content"]), WEATHER)


BAD = {"properties": {"a": {"uniqueItems": True}}}


@pytest.mark.parametrize(
    ("fields", "param", "names"),
    [
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools", "weather"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", ""),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": BAD}}]},
            "tools[0].function.parameters",
            "uniqueItems",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters",
            "object",
        ),
        ({"tools": TOOLS, "structured_outputs": {"regex": "a"}}, "structured_outputs.regex", "tools"),
        ({"tools": TOOLS, "ignore_eos": True}, "ignore_eos", "tools"),
    ],
)
def test_refusals(server: Server, fields: dict[str, Any], param: str, names: str) -> None:
    answer = server.chat("Hello", **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param and names in answer.json()["error"]["message"], answer.text


def test_what_is_not_enforced_is_named(server: Server) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": BAD}}]
    answer = server.chat("Hello", tools=tools, max_tokens=2)
    assert answer.headers["x-unsupported-params"] == "tools[0].function.parameters"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant"}, "messages[0]"),
        ({"role": "tool", "content": "x"}, "messages[0]"),
        (
            {"role": "user", "content": "x", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]},
            "messages[0]",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[1]"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_messages_are_looked_at(server: Server, message: dict[str, Any], param: str) -> None:
    check_error(server.post("/v1/chat/completions", {"messages": [message]}), 400, param)
