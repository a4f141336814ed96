"""Messages with tools as a chat template takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gptq_api.text.tools.layouts import CallLayout

Message = dict[str, Any]
_TOLD = """You may call functions. These are known, one JSON object each:
{functions}

To call one, answer with its name and arguments in this form and nothing behind it:
<tool_call>
{{"name": "NAME", "arguments": {{...}}}}
</tool_call>
What it returned comes in <tool_response> tags. Where no function helps, answer in words."""


def with_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]], layout: CallLayout) -> list[Message]:
    """Arguments are objects; where the template knows nothing of tools, they and all calls and results are text."""
    if layout.told_by_template:
        return [_with_objects(message) for message in messages]
    found = [_as_text(message, layout) for message in messages]
    if tools:
        functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        told = _TOLD.format(functions=functions)
        if found and found[0]["role"] == "system":
            found[0] = {**found[0], "content": f"{found[0]['content']}\n\n{told}"}
        else:
            found.insert(0, {"role": "system", "content": told})
    return _joined_results(found)


def _with_objects(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def has_many_calls(messages: Sequence[Message]) -> bool:
    """Whether any message calls more than one function."""
    return any(len(message.get("tool_calls") or ()) > 1 for message in messages)


def one_call_a_message(messages: Sequence[Message]) -> list[Message]:
    """Several calls of one answer, with their results behind them, as one after the other, for templates that raise for
    more than one call in a message, as LLaMA 3's does. Those that do not show a model what it said itself."""
    found: list[Message] = []
    index = 0
    while index < len(messages):
        message = messages[index]
        index += 1
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            found.append(message)
            continue
        results: dict[Any, list[Message]] = {}
        while index < len(messages) and messages[index]["role"] == "tool":
            results.setdefault(messages[index].get("tool_call_id"), []).append(messages[index])
            index += 1
        for number, call in enumerate(calls):
            content = message.get("content") if number == 0 else ""
            found.append({**message, "content": content or "", "tool_calls": [call]})
            found += results.pop(call["id"], [])
        found += [result for rest in results.values() for result in rest]
    return found


def _as_text(message: Message, layout: CallLayout) -> Message:
    if message["role"] == "tool":
        return {
            "role": "user",
            "content": f"<tool_response>\n{message.get('content') or ''}\n</tool_response>",
            "is_result": True,
        }
    calls = message.get("tool_calls") or []
    if not calls:
        return message
    texts = [
        f"{layout.head}{call['function']['name']}{layout.middle}{call['function']['arguments']}}}" for call in calls
    ]
    said = message.get("content") or ""
    text = layout.begin + layout.opening + layout.between.join(texts) + layout.closing
    return {"role": "assistant", "content": f"{said}\n{text}" if said else text}


def _joined_results(messages: list[Message]) -> list[Message]:
    """Results in a row, and what the user says behind them, are one turn: templates want turns to alternate."""
    found: list[Message] = []
    for message in messages:
        is_result = message.pop("is_result", False) if message["role"] == "user" else False
        follows = bool(found) and found[-1]["role"] == "user" and (is_result or found[-1].get("of_results"))
        if follows:
            found[-1]["content"] += "\n" + message["content"]
        else:
            found.append({**message, "of_results": True} if is_result else message)
    for message in found:
        message.pop("of_results", None)
    return found
