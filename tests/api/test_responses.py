"""The Responses API without a server: items become messages, tools functions, pieces of an answer events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from gptq_api.api.answers.choice import Piece
from gptq_api.api.answers.formats import Told
from gptq_api.api.answers.responses import ResponsesShape
from gptq_api.api.answers.work import Work
from gptq_api.api.errors import ApiError
from gptq_api.api.requests.responses import ResponsesRequest
from gptq_api.api.requests.translated import Names, Translated
from gptq_api.api.requests.turns import fitted
from gptq_api.api.tool_names import Origin, Toolbox, custom_input, model_name
from gptq_api.text.chat import TemplateFacts
from gptq_api.text.parts import CallDelta
from tests.support.agents import ALTERNATING, PLAIN, template, work

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
FUNCTION = {"type": "function", "name": "look", "description": "Looks.", "parameters": {"type": "object"}}


def translated(chosen: TemplateFacts | None = None, **fields: Any) -> Translated:
    body = ResponsesRequest.model_validate({"input": "Hello", **fields})
    return body.translated(chosen or template(PLAIN), strict=False)


def messages(*items: Any, chosen: TemplateFacts | None = None, **fields: Any) -> list[dict[str, Any]]:
    """As the chat pipeline gets them, before it looks at them."""
    body = ResponsesRequest.model_validate({"input": list(items), **fields})
    return fitted(body._messages([]), chosen or template(PLAIN))


def say(role: str, *texts: str) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text} for text in texts]}


def test_a_string_and_instructions() -> None:
    chat = translated(instructions="Be brief.", max_output_tokens=7, temperature=0.5, stream=True).chat
    assert [(message.role, message.content) for message in chat.messages] == [
        ("system", "Be brief."),
        ("user", "Hello"),
    ]
    assert (chat.max_tokens, chat.temperature, chat.stream) == (7, 0.5, True)


def test_messages_at_the_head_are_one() -> None:
    """Codex sends developer, user, developer, user."""
    sent = (say("developer", "a"), say("system", "b", "c"), say("user", "d"), say("developer", "e"), say("user", "f"))
    assert messages(*sent, instructions="i") == [
        {"role": "system", "content": "i\n\na\n\nb\nc"},
        {"role": "user", "content": "d"},
        {"role": "system", "content": "e"},
        {"role": "user", "content": "f"},
    ]
    assert messages(*sent, chosen=template(ALTERNATING)) == [
        {"role": "system", "content": "a\n\nb\nc"},
        {"role": "user", "content": "d\n\ne\n\nf"},
    ]


def test_calls_and_what_came_of_them() -> None:
    found = messages(
        {"role": "user", "content": "Look."},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "xyz"},
        say("assistant", "I will."),
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"at": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "spawn", "namespace": "agents", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "a wall"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "x"}, {"type": "input_image", "image_url": "data:"}],
        },
        {"type": "custom_tool_call", "call_id": "c3", "name": "patch", "input": 'a "b"\n'},
        {"type": "custom_tool_call_output", "call_id": "c3", "output": "done"},
    )
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "tool", "assistant", "tool"]
    calls = [call["function"] for call in found[1]["tool_calls"]]
    assert found[1]["content"] == "I will."
    assert calls == [{"name": "look", "arguments": '{"at": 1}'}, {"name": "agents__spawn", "arguments": "{}"}]
    assert found[3]["content"] == "x\n[left out: this model reads text only]"
    assert json.loads(found[4]["tool_calls"][0]["function"]["arguments"]) == {"input": 'a "b"\n'}
    assert found[5] == {"role": "tool", "tool_call_id": "c3", "content": "done"}


def test_tools_of_every_kind() -> None:
    body = ResponsesRequest.model_validate(
        {
            "input": "x",
            "tools": [
                {"type": "web_search"},
                FUNCTION | {"strict": False, "parameters": {"type": "object", "$schema": "http://x"}},
                {
                    "type": "namespace",
                    "name": "agents",
                    "description": "",
                    "tools": [FUNCTION, FUNCTION | {"name": "b"}],
                },
                {"type": "custom", "name": "patch", "format": {"type": "grammar", "syntax": "lark", "definition": "G"}},
                {"type": "shell"},
            ],
        }
    )
    names, skipped = Names(), list[str]()
    box, offered = body._tools(names, skipped)
    assert offered == ["look", "agents__look", "agents__b", "patch"]
    assert skipped == ["tools.web_search", "tools.custom.format", "tools.shell"]
    functions = [tool["function"] for tool in box.functions]
    assert functions[0] == {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object"},
        "strict": False,
    }
    assert functions[1]["strict"] is True, "the default of this API"
    assert functions[3]["parameters"]["required"] == ["input"] and "G" in functions[3]["description"]
    assert box.origin("agents__b") == Origin("b", "agents")
    assert names.of("tools[0].function.parameters.type") == "tools[1].parameters.type"
    assert names.of("tools[2].function.name") == "tools[2].tools[1].name"
    assert Names({"messages": "input"}).of("messages[4].content") == "input"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, None),
        ("required", "required"),
        ({"type": "function", "name": "look"}, {"type": "function", "function": {"name": "look"}}),
        ({"type": "custom", "name": "patch"}, {"type": "function", "function": {"name": "patch"}}),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]}, "required"),
        ({"type": "web_search_preview"}, None),
    ],
)
def test_tool_choice(choice: Any, expected: Any) -> None:
    fields = {"tools": [FUNCTION, {"type": "custom", "name": "patch"}], "tool_choice": choice}
    body = ResponsesRequest.model_validate({"input": "x", **fields})
    box, offered = body._tools(Names(), [])
    found = body._tool_fields(box, offered, [])
    assert found["tool_choice"] == expected
    allowed = isinstance(choice, dict) and choice["type"] == "allowed_tools"
    assert len(found["tools"]) == (1 if allowed else 2)


def test_long_names_stay_apart_and_stay_the_same() -> None:
    long = [model_name("n" * 70 + end, "space") for end in "ab"]
    assert long[0] != long[1] and all(len(name) == 64 for name in long)
    assert model_name("tool", "mcp__server__") == "mcp__server__tool"
    assert custom_input('{"input": "a\\n"}') == "a\n" and custom_input('{"inp') == '{"inp'


def test_formats() -> None:
    body = ResponsesRequest.model_validate(
        {"input": "x", "text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}}}
    )
    names = Names()
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": True}}
    assert body._format(names) == {"response_format": wanted}
    assert names.of("response_format.json_schema.schema") == "text.format.schema"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"id": "msg_1"}]}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [5]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "namespace", "name": "x"}]}, "tools[0].tools"),
        ({"tools": [FUNCTION | {"parameters": 5}]}, "tools[0].parameters"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "gone"}}, "tool_choice"),
        ({"text": {"format": {"type": 5}}}, "text.format.type"),
    ],
)
def test_refusals_name_the_place(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as found:
        translated(**fields)
    assert found.value.status_code == 400 and found.value.error["param"] == param


def test_what_has_no_effect_is_named() -> None:
    fields: dict[str, Any] = {
        "store": True,
        "truncation": "auto",
        "reasoning": {"effort": "high", "summary": "auto"},
        "text": {"verbosity": "low"},
        "frobnicate": 1,
        "include": ["reasoning.encrypted_content"],
        "client_metadata": {"a": "b"},
        "prompt_cache_key": "k",
        "background": False,
        "input": [{"type": "shell_call", "call_id": "c"}, {"role": "user", "content": "x"}],
    }
    said = translated(**fields).headers()["x-unsupported-params"]
    assert said == "frobnicate, store, truncation, reasoning.effort, text.verbosity, input.shell_call"
    with pytest.raises(ApiError):
        ResponsesRequest.model_validate({"input": "x", "frobnicate": 1}).translated(template(PLAIN), strict=True)


def shape(box: Toolbox | None = None) -> ResponsesShape:
    echoed = {"model": "demo", "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    return ResponsesShape(echoed, (box or Toolbox()).origin, None)


def events_of(made: ResponsesShape, asked: Work, pieces: Sequence[Piece], failure: ApiError | None = None) -> list[Any]:
    """As openai's types read them; the numbers are in order, the name of each event is its type."""
    data = made.begin(asked) + b"".join(made.piece(asked, piece) for piece in pieces)
    data += made.end(asked) if failure is None else made.failed(asked, failure)
    found = []
    for event in data.decode().removesuffix("\n\n").split("\n\n"):
        name, line = event.split("\n")
        found.append(EVENTS.validate_python(json.loads(line.removeprefix("data: ")), strict=False))
        assert name == f"event: {found[-1].type}"
    assert [event.sequence_number for event in found] == list(range(len(found)))
    return found


def kinds(found: list[Any]) -> list[str]:
    return [event.type.removeprefix("response.") for event in found]


def pieces(asked: Work, *parts: dict[str, Any], reason: str = "stop") -> Iterator[Piece]:
    choice = asked.choices[0]
    for part in parts:
        yield Piece(choice, part.get("text", ""), [], None, part.get("reasoning", ""), part.get("calls", ()))
    yield Piece(choice, "", [], reason)  # type: ignore[arg-type]


async def test_the_events_of_a_text() -> None:
    with work() as asked:
        found = events_of(shape(), asked, list(pieces(asked, {"text": "Hel"}, {"text": "lo\u2028"})))
    assert kinds(found) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    final = Response.model_validate(found[-1].response.model_dump())
    assert final.output_text == "Hello\u2028" == found[6].text and final.status == "completed"
    assert final.usage is not None and final.usage.input_tokens == 3


async def test_the_events_of_thoughts_and_calls() -> None:
    box = Toolbox()
    box.add(Origin("spawn", "agents"), "", None)
    box.add(Origin("patch", custom=True), "", None)
    parts: list[dict[str, Any]] = [
        {"reasoning": "hm"},
        {"reasoning": "m", "text": "Now"},
        {"calls": [CallDelta(0, "c0", "agents__spawn", "")]},
        {"calls": [CallDelta(0, None, None, '{"a":'), CallDelta(0, None, None, "1}")]},
        {"calls": [CallDelta(1, "c1", "patch", '{"input":"x\\n'), CallDelta(1, None, None, 'y"}')]},
    ]
    told = Told()
    with work() as asked:
        sent = list(pieces(asked, *parts, reason="tool_calls"))
        found = events_of(shape(box), asked, sent)
        for piece in sent:
            told.add(piece)
        whole = Response.model_validate(shape(box).whole(asked, [told]))
    assert [kind for kind in kinds(found) if "output_item" not in kind] == [
        *("created", "in_progress"),
        *("content_part.added", "reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "content_part.added", "output_text.delta", "output_text.done", "content_part.done"),
        *("function_call_arguments.delta", "function_call_arguments.delta", "function_call_arguments.done"),
        *("custom_tool_call_input.delta", "custom_tool_call_input.done", "completed"),
    ]
    final = found[-1].response
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "custom_tool_call"]
    assert [event.output_index for event in found if event.type == "response.output_item.added"] == [0, 1, 2, 3]
    call, custom = final.output[2:]
    assert (call.call_id, call.name, call.namespace, call.arguments) == ("c0", "spawn", "agents", '{"a":1}')
    assert (custom.call_id, custom.name, custom.input) == ("c1", "patch", "x\ny")
    ids = {"id", "created_at", "completed_at"}
    assert [item.model_dump(exclude=ids) for item in whole.output] == [
        item.model_dump(exclude=ids) for item in final.output
    ]


async def test_cut_failed_and_empty_answers() -> None:
    with work() as asked:
        cut = events_of(shape(), asked, list(pieces(asked, {"text": "He"}, reason="length")))
        failed = events_of(shape(), asked, list(pieces(asked, {"text": "He"}))[:-1], ApiError(503, "gone"))
        empty = events_of(shape(), asked, list(pieces(asked)))
        told = Told(finish_reason="length", text="He")
        whole = Response.model_validate(shape().whole(asked, [told]))
    answers: list[Any] = [cut[-1].response, whole]
    for answer in answers:
        assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
        assert answer.output[0].status == "incomplete"
    assert kinds(cut)[-1] == "incomplete"
    assert kinds(failed)[-2:] == ["output_item.done", "failed"]
    assert failed[-1].response.error.message == "gone" and failed[-1].response.output[0].status == "incomplete"
    assert empty[-1].response.output_text == "" and len(empty[-1].response.output) == 1
