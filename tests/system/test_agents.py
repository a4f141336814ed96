"""/v1/responses and /v1/messages over HTTP, with the demo model: through openai's client, and raw."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.support.server import RawStream, Server

RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
BILLING = "x-anthropic-billing-header: cc_version=2.1; cc_entrypoint=cli; cch={};"
FILLER = " ".join(f"word{i}" for i in range(60))


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


def say(text: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {"max_tokens": 12, "messages": [{"role": "user", "content": text}], **fields}


def events(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The data of all events of a stream; each is called what its type says, and none is [DONE]."""
    raw = RawStream(server, {**body, "stream": True}, path)
    try:
        assert raw.head()[0] == 200
        found = []
        for event in raw.events():
            name, data = event.decode().split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
        return found
    finally:
        raw.close()


def test_openai_asks_for_a_response(server: Server) -> None:
    client = client_of(server)
    answer = client.responses.create(model="demo", input="Hello", temperature=0)
    assert answer.status == "completed" and answer.output_text and answer.error is None
    assert answer.usage is not None and answer.usage.output_tokens > 0
    assert answer.output_text == server.chat(temperature=0).json()["choices"][0]["message"]["content"]
    with client.responses.stream(model="demo", input="Hello", temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == answer.output_text
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    raw = list(client.responses.create(model="demo", input="Hello", temperature=0, stream=True))
    assert [event.sequence_number for event in raw] == list(range(len(raw)))
    parsed = client.responses.parse(model="demo", input="Hello", temperature=0)
    assert parsed.output_text == answer.output_text


def test_a_conversation_goes_on_without_a_state(server: Server) -> None:
    client = client_of(server)
    first = client.responses.create(model="demo", input=FILLER, max_output_tokens=8, extra_body={"ignore_eos": True})
    assert first.status == "incomplete" and first.incomplete_details is not None
    assert first.incomplete_details.reason == "max_output_tokens"
    history = [
        {"role": "user", "content": FILLER},
        *[item.model_dump() for item in first.output],
        {"role": "user", "content": "Go on."},
    ]
    second = client.responses.create(model="demo", input=history, max_output_tokens=4)  # type: ignore[arg-type]
    assert second.usage is not None and second.usage.input_tokens_details.cached_tokens > 60
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="demo", input="Go on.", previous_response_id=first.id)
    assert refused.value.param == "previous_response_id" and "state" in str(refused.value)


def test_logprobs_of_a_response(server: Server) -> None:
    include: Any = ["message.output_text.logprobs"]
    asked = {"input": "Hello", "include": include, "top_logprobs": 2, "max_output_tokens": 6, "temperature": 0}
    told = server.post(RESPONSES, asked).json()["output"][0]["content"][0]
    assert len(told["logprobs"]) >= 5 and all(len(entry["top_logprobs"]) == 2 for entry in told["logprobs"])
    found = events(server, RESPONSES, asked)
    deltas = [entry for event in found if event["type"].endswith("text.delta") for entry in event["logprobs"]]
    assert deltas == told["logprobs"]


def test_errors_of_responses(server: Server) -> None:
    limit = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
    for body, status, param in (
        ({}, 400, "input"),
        ({"input": "x", "max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"input": "x", "model": "nope"}, 404, "model"),
        ({"input": "word " * limit}, 400, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input[0].content[0]"),
        ({"input": "x", "min_tokens": 5, "max_output_tokens": 4}, 400, "min_tokens"),
    ):
        answer = server.post(RESPONSES, body)
        assert answer.status_code == status and answer.json()["error"]["param"] == param, answer.text
    exceeded = server.post(RESPONSES, {"input": "word " * limit}).json()["error"]
    assert exceeded["code"] == "context_length_exceeded" and exceeded["message"].startswith("Your input exceeds")
    assert server.post(RESPONSES, {"input": "x", "max_output_tokens": 32_000}).headers["x-max-tokens"]


def test_a_message(server: Server) -> None:
    answer = server.post(MESSAGES, say(temperature=0))
    assert answer.status_code == 200 and answer.headers["request-id"] == answer.headers["x-request-id"]
    message = answer.json()
    assert message["type"] == "message" and message["role"] == "assistant" and message["model"] == "demo"
    found = events(server, MESSAGES, say(temperature=0))
    text = "".join(event["delta"]["text"] for event in found if event["type"] == "content_block_delta")
    assert [block["text"] for block in message["content"]] == [text]
    assert message["stop_reason"] == "max_tokens" == found[-2]["delta"]["stop_reason"]
    assert found[0]["type"] == "message_start" and found[-1]["type"] == "message_stop"
    assert found[-2]["usage"]["output_tokens"] == 12 == message["usage"]["output_tokens"]
    whole = server.post(MESSAGES, say(temperature=0, max_tokens=32_000))
    assert whole.json()["stop_reason"] == "end_turn" and int(whole.headers["x-max-tokens"]) < 32_000
    begun = say(temperature=0)
    begun["messages"].append({"role": "assistant", "content": whole.json()["content"][0]["text"][:6]})
    assert server.post(MESSAGES, begun).json()["content"][0]["text"].startswith(whole.json()["content"][0]["text"][6:9])


def test_a_stop_sequence_is_told(server: Server) -> None:
    text = server.post(MESSAGES, say(temperature=0)).json()["content"][0]["text"]
    word = text.split()[2]
    body = say(temperature=0, stop_sequences=["never", word])
    message = server.post(MESSAGES, body).json()
    assert message["stop_reason"] == "stop_sequence" and message["stop_sequence"] == word
    assert message["content"][0]["text"] == text[: text.index(word)]
    end = events(server, MESSAGES, body)[-2]["delta"]
    assert end == {"stop_reason": "stop_sequence", "stop_sequence": word}


def test_a_second_turn_is_cached_despite_the_attribution_line(server: Server) -> None:
    """What Claude Code sends: blocks of system text of which the first is another one each time, a system message in
    the middle, cache_control, and fields of which nothing here knows."""

    def ask(checksum: str, *more: dict[str, Any]) -> list[dict[str, Any]]:
        system = [{"type": "text", "text": BILLING.format(checksum)}]
        system += [{"type": "text", "text": FILLER, "cache_control": {"type": "ephemeral"}}]  # type: ignore[dict-item]
        messages = [{"role": "user", "content": "Hello"}, {"role": "system", "content": "It rains."}, *more]
        body = {"system": system, "messages": messages, "max_tokens": 8, "temperature": 0}
        body |= {"thinking": {"type": "adaptive"}, "context_management": {"edits": []}, "metadata": {"user_id": "u"}}
        return events(server, MESSAGES + "?beta=true", body)

    first = ask("aaaa")
    text = "".join(event["delta"]["text"] for event in first if event["type"] == "content_block_delta")
    second = ask("bbbb", {"role": "assistant", "content": text}, {"role": "user", "content": "Go on."})
    usage = second[0]["message"]["usage"]
    assert usage["cache_read_input_tokens"] > 60
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] > usage["cache_read_input_tokens"]
    headers = server.post(MESSAGES, say(system=BILLING.format("cccc") + "\nHi")).headers
    assert headers["x-dropped-system-line"] == "x-anthropic-billing-header"


def test_tokens_are_counted(server: Server) -> None:
    body = {"messages": say()["messages"], "system": "Be brief."}
    answer = server.post(COUNT, body)
    usage = server.post(MESSAGES, {**body, "max_tokens": 1}).json()["usage"]
    assert answer.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    limit = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
    assert server.post(COUNT, say("a " * (2 * limit))).json()["input_tokens"] > limit


def test_errors_of_messages(server: Server, strict_server: Server) -> None:
    def check(answer: Any, status: int, kind: str, words: str) -> None:
        error = answer.json()
        assert answer.status_code == status and error["type"] == "error", answer.text
        assert error["error"]["type"] == kind and words in error["error"]["message"], answer.text
        assert error["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]

    invalid = "invalid_request_error"
    limit = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
    for path in (MESSAGES, COUNT):
        check(server.post(path, say(model="nope")), 404, "not_found_error", "nope")
        check(server.post(path, {"max_tokens": 5}), 400, invalid, "messages")
        check(server.http.get(path), 405, invalid, "POST")
        check(strict_server.post(path, say(), authorization="Bearer x"), 401, "authentication_error", "key")
        check(strict_server.post(path, say("x" * 200_000)), 413, "request_too_large", "100000")
    check(server.post(MESSAGES, {"messages": say()["messages"]}), 400, invalid, "max_tokens")
    check(server.post(MESSAGES, say("word " * limit)), 400, invalid, "prompt is too long: ")
    check(server.post(MESSAGES, say(stop_sequences=[""])), 400, invalid, "stop_sequences[0]")
    held = [RawStream(strict_server, say(ignore_eos=True, max_tokens=900, stream=True), MESSAGES, key="first-key")]
    try:
        for stream in held:
            stream.head()
        strict_server.http.headers["x-api-key"] = "sk-of-another-service"  # Claude Code sends two
        assert strict_server.post(MESSAGES, say()).status_code == 200
    finally:
        strict_server.http.headers.pop("x-api-key", None)
        for stream in held:
            stream.close()
