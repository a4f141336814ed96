"""openai-python, which is in our own environment: it checks every answer against its types here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI
from openai.types.responses import EasyInputMessageParam
from pydantic import BaseModel, Field

from tests.support.server import Server, refuses
from tests.support.spelling_model import write

CALL = '<tool_call>{"name": "multiply", "arguments": {"a": 6, "b": 7}}</tool_call>'
ANSWER = "Done, as you said."
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}


class Person(BaseModel, extra="forbid"):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url, api_key="none", _strict_response_validation=True) as made:
        yield made


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """A server whose model calls `multiply`, and after the result says ANSWER."""
    checkpoint = write(tmp_path_factory.mktemp("calling") / "model", CALL, after_tool=ANSWER)
    with Server("--model-path", str(checkpoint), "--accept-any-model") as server:
        if refuses(server.chat(tools=[{"type": "function", "function": {"name": "f"}}], max_tokens=1)):
            pytest.skip("this server takes no tools")
        with OpenAI(base_url=server.url, api_key="none", _strict_response_validation=True) as made:
            yield made


def name_of(client: OpenAI) -> str:
    return client.models.list().data[0].id


def test_a_chat_and_its_stream_say_the_same(client: OpenAI) -> None:
    fields: Any = {"model": name_of(client), "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
    whole = client.chat.completions.create(**fields).choices[0].message.content
    with client.chat.completions.stream(**fields) as events:
        final = events.get_final_completion()
    assert whole and final.choices[0].message.content == whole


def test_parse_gives_an_object(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=name_of(client),
        messages=[{"role": "user", "content": "Who?"}],
        response_format=Person,
        max_tokens=300,
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_responses_whole_streamed_and_parsed(client: OpenAI) -> None:
    model = name_of(client)
    whole = client.responses.create(model=model, input="Hello", temperature=0, max_output_tokens=60)
    assert whole.output_text and whole.usage is not None
    with client.responses.stream(model=model, input="Hello", temperature=0, max_output_tokens=60) as events:
        kinds = [event.type for event in events]
        final = events.get_final_response()
    assert final.output_text == whole.output_text
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == f"response.{final.status}"
    parsed = client.responses.parse(model=model, input="Who?", text_format=Person, max_output_tokens=300)
    assert isinstance(parsed.output_parsed, Person)


@pytest.mark.parametrize(
    "conversation",
    [
        [("user", "Say hello.")],
        [("system", "You are a pirate."), ("user", "Say hello.")],
        [("user", "My name is Alice."), ("assistant", "Hello, Alice!"), ("user", "What is my name?")],
    ],
    ids=["one", "system", "turns"],
)
def test_a_conversation_of_items(client: OpenAI, conversation: list[Any]) -> None:
    """What Open Responses asks of texts, with the client's types for its schema."""
    items = [EasyInputMessageParam(type="message", role=role, content=text) for role, text in conversation]
    answer = client.responses.create(model=name_of(client), input=list(items))
    assert answer.status == "completed" and answer.output_text


def test_a_tool_is_called_and_its_result_comes_back(calling: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is 6 times 7?"}]
    tools: Any = [{"type": "function", "function": {"name": "multiply", "parameters": PARAMETERS}}]
    with calling.chat.completions.stream(model="any", messages=messages, tools=tools) as events:
        asked = events.get_final_completion().choices[0]
    assert asked.finish_reason == "tool_calls" and asked.message.tool_calls
    (call,) = asked.message.tool_calls
    assert json.loads(call.function.arguments) == {"a": 6, "b": 7}
    messages += [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call.model_dump(exclude={"function": {"parsed_arguments"}})],
        },
        {"role": "tool", "tool_call_id": call.id, "content": "42"},
    ]
    answer = calling.chat.completions.create(model="any", messages=messages, tools=tools)
    assert answer.choices[0].message.content == ANSWER
    assert answer.usage and answer.usage.prompt_tokens_details and answer.usage.prompt_tokens_details.cached_tokens


def test_a_function_is_called_by_responses(calling: OpenAI) -> None:
    tools: Any = [{"type": "function", "name": "multiply", "parameters": PARAMETERS, "strict": False}]
    items: list[Any] = [{"role": "user", "content": "What is 6 times 7?"}]
    asked = calling.responses.create(model="any", input=items, tools=tools)
    (call,) = [item for item in asked.output if item.type == "function_call"]
    assert json.loads(call.arguments) == {"a": 6, "b": 7}
    items += [call.model_dump(), {"type": "function_call_output", "call_id": call.call_id, "output": "42"}]
    assert calling.responses.create(model="any", input=items, tools=tools).output_text == ANSWER
