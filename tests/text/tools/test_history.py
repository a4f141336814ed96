"""Past calls and results, as templates take them."""

from __future__ import annotations

from typing import Any

from gptq_api.text.tools.history import has_many_calls, one_call_a_message, with_tools
from gptq_api.text.tools.layouts import GENERIC, HERMES, LLAMA_3

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def call(call_id: str, arguments: str = '{"a": 1}') -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}


def result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": f"of {call_id}"}


USER: dict[str, Any] = {"role": "user", "content": "hi"}


def test_arguments_become_objects() -> None:
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call("a")]}, result("a")]
    found = with_tools(messages, TOOLS, HERMES)
    assert found[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert found[0] == USER and found[2] == result("a")


def test_calls_of_one_answer_follow_each_other() -> None:
    answer = {"role": "assistant", "content": "See", "tool_calls": [call("a"), call("b"), call("c")]}
    messages = with_tools([USER, answer, result("b"), result("a"), USER], TOOLS, LLAMA_3)
    assert has_many_calls(messages) and len(messages) == 5
    found = one_call_a_message(messages)
    assert not has_many_calls(found)
    assert [(m["role"], [c["id"] for c in m.get("tool_calls", [])] or m["content"]) for m in found] == [
        ("user", "hi"),
        ("assistant", ["a"]),
        ("tool", "of a"),
        ("assistant", ["b"]),
        ("tool", "of b"),
        ("assistant", ["c"]),
        ("user", "hi"),
    ]
    assert found[1]["content"] == "See" and found[3]["content"] == ""


def test_where_the_template_knows_nothing_all_is_text() -> None:
    answer = {"role": "assistant", "content": "", "tool_calls": [call("a"), call("b", "{}")]}
    found = with_tools([USER, answer, result("a"), result("b"), USER], TOOLS, GENERIC)
    assert [message["role"] for message in found] == ["system", "user", "assistant", "user"]
    assert '"name": "f"' in found[0]["content"]
    assert found[2]["content"] == (
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    )
    assert found[3]["content"] == (
        "<tool_response>\nof a\n</tool_response>\n<tool_response>\nof b\n</tool_response>\nhi"
    )


def test_a_system_message_stays_in_front() -> None:
    found = with_tools([{"role": "system", "content": "Be kind."}, USER], TOOLS, GENERIC)
    assert [message["role"] for message in found] == ["system", "user"]
    assert found[0]["content"].startswith("Be kind.\n\n")
    assert with_tools([USER], [], GENERIC) == [USER]
