"""LiteLLM: a chat, a stream, a tool that is called, a JSON schema."""

import json
import os
import sys
from typing import Any

import litellm

litellm.telemetry = False
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "multiply",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


def ask(messages: list[Any], **fields: Any) -> Any:
    return litellm.completion(
        model="openai/demo", api_base=os.environ["OPENAI_BASE_URL"], messages=messages, max_tokens=300, **fields
    )


question: dict[str, Any] = {"role": "user", "content": "What is 6 times 7?"}
match sys.argv[1]:
    case "chat":
        assert ask([question]).choices[0].message.content
        assert "".join(chunk.choices[0].delta.content or "" for chunk in ask([question], stream=True))
    case "tools":
        message = ask([question], tools=[TOOL]).choices[0].message
        (call,) = message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert arguments == {"a": 6, "b": 7}, call
        result = {"role": "tool", "tool_call_id": call.id, "content": "42"}
        answer = ask([question, message, result], tools=[TOOL]).choices[0].message
        assert answer.content == "Done, as you said.", answer
    case "structured":
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
        person = json.loads(ask([question], response_format=form).choices[0].message.content)
        assert person.keys() == {"name", "age"}
