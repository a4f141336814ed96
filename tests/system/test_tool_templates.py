"""Tools under chat templates of other families than the demo model's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from tests.support.server import Server, chat_body, stream_chunks
from tests.system.test_tools import TOOLS, WEATHER

CALL = "{{ call.function.name }} {{ call.function.arguments | tojson }}"
ONE_CALL = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    '{"name": .., "parameters": ..}{% for message in messages %}<|{{ message.role }}|>'
    "{% if message.tool_calls %}{% if message.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
    "{% for call in message.tool_calls %}" + CALL + "{% endfor %}{% else %}{{ message.content }}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""LLaMA 3.1's behaviour: a second call in one message is an error"""
SAID = {
    "pythonic": "[func_name1(params_name1=params_value1)]",
    "functionary-3.1": "<function=NAME>{}</function>",
}


def written(folder: Path, template: str) -> str:
    path = folder / "template.jinja"
    path.write_text(template)
    return str(path)


@pytest.fixture(params=SAID)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    template = ONE_CALL.replace('{"name": .., "parameters": ..}', SAID[request.param])
    with Server("--chat-template", written(tmp_path, template)) as server:
        yield server


def test_calls_by_patterns_are_forced_and_streamed(server: Server) -> None:
    for seed in range(4):
        fields = {"tools": TOOLS, "tool_choice": "required", "seed": seed, "max_tokens": 200}
        fields["parallel_tool_calls"] = False
        choice = server.chat("Hello", **fields).json()["choices"][0]
        if choice["finish_reason"] == "length":
            continue
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        schema = WEATHER if call["function"]["name"] == "weather" else {"maxProperties": 0}
        jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
        deltas = [
            delta["function"]["arguments"]
            for chunk in stream_chunks(server, chat_body("Hello", **fields))
            for delta in chunk["choices"][0]["delta"].get("tool_calls", [])
        ]
        assert "".join(deltas) == call["function"]["arguments"]


def test_several_calls_of_a_message_are_rendered_where_a_template_takes_one(tmp_path: Path) -> None:
    calls = [
        {"id": name, "type": "function", "function": {"name": name, "arguments": '{"a": "<|end|>", "<|user|>": 1}'}}
        for name in ("first", "second")
    ]
    results = [{"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in ("second", "first")]
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        *results,
    ]
    with Server("--chat-template", written(tmp_path, ONE_CALL)) as server:
        body = {"messages": messages, "tools": TOOLS}
        prompt = server.post("/apply-template", body).json()["prompt"]
        places = [prompt.index(text) for text in ("first {", "of first", "second {", "of second")]
        assert places == sorted(places)
        tokens = server.post("/tokenize", {"messages": messages, "return_token_strs": True}).json()
        turns = [token for token in tokens["token_strs"] if token in ("<|end|>", "<|user|>")]
        assert turns == ["<|user|>", *["<|end|>"] * 5], "what arguments spell is text, keys and values"
