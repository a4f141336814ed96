"""Anthropic's Messages API without a server: blocks become messages, pieces of an answer events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from gptq_api.api.answers.choice import Piece
from gptq_api.api.answers.formats import Told
from gptq_api.api.answers.messages import MessagesShape
from gptq_api.api.answers.work import Work
from gptq_api.api.document.shapes import SHAPES
from gptq_api.api.errors import ApiError, context_exceeded
from gptq_api.api.messages_errors import messages_error, messages_status
from gptq_api.api.requests.messages import MessagesRequest, _Turns
from gptq_api.api.requests.translated import Names, Translated
from gptq_api.api.tool_names import Origin, Toolbox
from gptq_api.text.parts import CallDelta
from tests.support.agents import PLAIN, template, work
from tests.support.openapi import validate

TOOL = {"name": "look", "description": "Looks.", "input_schema": {"type": "object", "$schema": "http://x"}}
DOCUMENT = {"components": {"schemas": SHAPES}}
BILLING = "x-anthropic-billing-header: cc_version=1; cch={};"


def request(**fields: Any) -> MessagesRequest:
    hello = [{"role": "user", "content": "Hello"}]
    return MessagesRequest.model_validate({"max_tokens": 5, "messages": hello, **fields})


def translated(**fields: Any) -> Translated:
    return request(**fields).translated(template(PLAIN), strict=False)


def turns(*messages: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    skipped: list[str] = []
    taken = _Turns(skipped)
    for index, message in enumerate(messages):
        taken.add(message["role"], message["content"], f"messages[{index}].content")
    return taken.messages, skipped


def test_fields() -> None:
    asked = translated(
        system="Be brief.",
        stop_sequences=["END"],
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        stream=True,
        metadata={"user_id": "u"},
        service_tier="auto",
        thinking={"type": "adaptive"},
    )
    chat = asked.chat
    assert [(message.role, message.content) for message in chat.messages] == [
        ("system", "Be brief."),
        ("user", "Hello"),
    ]
    assert (chat.max_tokens, chat.stop, chat.temperature, chat.top_k, chat.top_p) == (5, ["END"], 0.5, 3, 0.9)
    assert chat.stream and not chat.continue_final_message and asked.headers() == {}


def test_the_attribution_line_is_dropped_and_said() -> None:
    prompts = []
    for checksum in ("a1", "b2"):
        line = BILLING.format(checksum)
        for system in (
            [{"type": "text", "text": line}, {"type": "text", "text": "Be brief.", "cache_control": {"type": "e"}}],
            line + "\nBe brief.",
        ):
            asked = translated(system=system)
            assert asked.headers() == {"x-dropped-system-line": "x-anthropic-billing-header"}
            prompts.append([message.rendered() for message in asked.chat.messages])
    assert all(prompt == prompts[0] for prompt in prompts)
    assert translated(system="Be brief.\n" + BILLING).headers() == {}, "at the head alone"


def test_calls_and_results() -> None:
    found, skipped = turns(
        {"role": "user", "content": [{"type": "text", "text": "Look."}, {"type": "image", "source": {}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "s"},
                {"type": "text", "text": "I will."},
                {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": 1}},
                {"type": "tool_use", "id": "t2", "name": "look", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "a wall"},
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "no"}],
                },
                {"type": "text", "text": "Go on.", "cache_control": {"type": "ephemeral"}},
                {"type": "server_tool_use"},
            ],
        },
        {"role": "system", "content": "A reminder."},
    )
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "tool", "user", "system"]
    assert found[0]["content"] == "Look.\n[an image was here: this model reads text only]"
    assert [call["function"]["arguments"] for call in found[1]["tool_calls"]] == ['{"at": 1}', "{}"]
    assert found[2] == {"role": "tool", "tool_call_id": "t1", "content": "a wall"}
    assert found[3]["content"] == "Error: no"
    assert skipped == ["messages.image", "messages.server_tool_use"]


def test_an_answer_that_was_begun_is_gone_on_with() -> None:
    chat = translated(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "So"}]).chat
    assert chat.continue_final_message


def test_tools() -> None:
    names, skipped = Names(), list[str]()
    body = request(tools=[{"type": "web_search_20250305", "name": "web_search"}, TOOL, TOOL | {"name": "n" * 100}])
    box = body._tools(names, skipped)
    functions = [tool["function"] for tool in box.functions]
    assert functions[0] == {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
    assert len(functions[1]["name"]) == 64 and box.origin(functions[1]["name"]).name == "n" * 100
    assert skipped == ["tools.web_search_20250305"]
    assert names.of("tools[0].function.parameters.properties.x") == "tools[1].input_schema.properties.x"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any", "disable_parallel_tool_use": True}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "look"}, {"type": "function", "function": {"name": "look"}}),
        ({"type": "of_tomorrow"}, "auto"),
        (None, "auto"),
    ],
)
def test_tool_choice(choice: Any, expected: Any) -> None:
    body = request(tools=[TOOL], tool_choice=choice)
    found = body._tool_fields(body._tools(Names(), []), [])
    assert found["tool_choice"] == expected
    assert found["parallel_tool_calls"] is (False if choice and len(choice) == 2 and "name" not in choice else None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].input"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
        ({"tools": [TOOL | {"input_schema": 5}]}, "tools[0].input_schema"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "gone"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ],
)
def test_refusals_name_the_place(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as found:
        translated(**fields)
    assert found.value.status_code == 400 and found.value.error["param"] == param


def test_bounds() -> None:
    for fields in ({"max_tokens": None}, {"max_tokens": 0}, {"temperature": 1.1}, {"stop_sequences": [""]}):
        with pytest.raises(ValidationError):
            request(**fields)


def test_what_has_no_effect_is_named() -> None:
    said = translated(
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "high"},
        context_management={"edits": [{"type": "clear"}]},
        frobnicate=1,
    ).headers()
    names = "frobnicate, thinking.budget_tokens, output_config.effort, context_management"
    assert said == {"x-unsupported-params": names}


def shape(box: Toolbox | None = None, *, thinking: bool = True) -> MessagesShape:
    return MessagesShape("demo", (box or Toolbox()).origin, ["END"], thinking=thinking)


def events_of(made: MessagesShape, asked: Work, pieces: list[Piece], failure: ApiError | None = None) -> list[Any]:
    """Each has the shape that /openapi.json tells; the name of each is its type."""
    data = made.begin(asked) + b"".join(made.piece(asked, piece) for piece in pieces)
    data += made.end(asked) if failure is None else made.failed(asked, failure)
    found = []
    for event in data.decode().removesuffix("\n\n").split("\n\n"):
        name, line = event.split("\n")
        found.append(json.loads(line.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
        validate(DOCUMENT, SHAPES["MessageEvent"], found[-1])
    return found


async def test_the_events_of_a_text() -> None:
    with work() as asked:
        choice = asked.choices[0]
        found = events_of(
            shape(), asked, [Piece(choice, "He", []), Piece(choice, "y", []), Piece(choice, "", [], "stop")]
        )
    assert [event["type"] for event in found] == [
        *("message_start", "content_block_start", "content_block_delta", "content_block_delta"),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    message = found[0]["message"]
    assert message["usage"]["input_tokens"] == 3 and message["usage"]["cache_read_input_tokens"] == 0
    assert message["content"] == [] and message["stop_reason"] is None
    assert found[2]["delta"] == {"type": "text_delta", "text": "He"}
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


async def test_the_events_of_thoughts_and_calls() -> None:
    box = Toolbox()
    box.add(Origin("look"), "", None)
    with work() as asked:
        choice = asked.choices[0]
        sent = [
            Piece(choice, "", [], None, "hm"),
            Piece(choice, "Now", [], None, "m"),
            Piece(choice, "", [], None, "", [CallDelta(0, "c0", "look", ""), CallDelta(0, None, None, '{"a":1}')]),
            Piece(choice, "", [], "tool_calls", "", [CallDelta(1, "c1", "look", "{}")]),
        ]
        found = events_of(shape(box), asked, sent)
        told = Told()
        for piece in sent:
            told.add(piece)
        whole = shape(box).whole(asked, [told])
        quiet = events_of(shape(box, thinking=False), asked, sent)
        validate(DOCUMENT, SHAPES["Message"], whole)
    starts = [event["content_block"]["type"] for event in found if event["type"] == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use", "tool_use"]
    deltas = [event["delta"]["type"] for event in found if event["type"] == "content_block_delta"]
    assert deltas == [
        *("thinking_delta", "thinking_delta", "signature_delta", "text_delta"),
        *("input_json_delta", "input_json_delta"),
    ]
    indices = [event["index"] for event in found if event["type"] == "content_block_stop"]
    assert indices == [0, 1, 2, 3] and found[-2]["delta"]["stop_reason"] == "tool_use"
    assert "thinking" not in json.dumps(quiet)
    assert whole["stop_reason"] == "tool_use" and [block["type"] for block in whole["content"]] == starts
    assert whole["content"][2] == {"type": "tool_use", "id": "c0", "name": "look", "input": {"a": 1}}


async def test_cut_failed_and_empty_answers() -> None:
    with work() as asked:
        choice = asked.choices[0]
        cut = events_of(shape(), asked, [Piece(choice, "He", [], "length")])
        failed = events_of(shape(), asked, [Piece(choice, "He", [])], ApiError(503, "gone"))
        at_once = events_of(shape(), asked, [], ApiError(429, "full", code="server_full"))
        empty = events_of(shape(), asked, [Piece(choice, "", [], "stop")])
    assert cut[-2]["delta"]["stop_reason"] == "max_tokens"
    assert failed[-1]["error"] == {"type": "api_error", "message": "gone"}
    assert at_once[-1]["error"]["type"] == "overloaded_error"
    assert [event["type"] for event in empty][1:3] == ["content_block_start", "content_block_stop"]


def test_errors_in_their_words() -> None:
    exceeded = context_exceeded(100, 120, 1, what="messages", param="messages").error
    told = messages_error(400, exceeded, "req_1")
    assert told["error"] == {"type": "invalid_request_error", "message": "prompt is too long: 120 tokens > 99 maximum"}
    assert told["request_id"] == "req_1" and told["type"] == "error"
    kinds = [(401, "authentication_error"), (404, "not_found_error"), (413, "request_too_large"), (500, "api_error")]
    for status, kind in kinds:
        assert messages_error(status, ApiError(status, "x").error, "r")["error"]["type"] == kind
    assert messages_status(429, "server_full") == 529, "everybody's limit"
    assert messages_status(429, "share_full") == 429 and messages_status(400, None) == 400
