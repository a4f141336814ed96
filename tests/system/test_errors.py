"""Everything a client can get wrong: the status, the field that is named, OpenAI's shape, and a server that goes on."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest

from gptq_api.api.errors import ApiError
from gptq_api.api.requests.refused import refuse
from tests.support.server import Server, chat_body, check_error

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}


NUMBERS = {
    "temperature": ["-1", "2.1", "1e999", "NaN", "Infinity", "-Infinity", '"1"', "true", "[]", str(2**63)],
    "top_p": ["-0.1", "1.1", "NaN", '"1"', "true", "{}"],
    "top_k": ["-2", "1.5", str(2**31), str(2**63), '"1"', "true", "NaN"],
    "min_p": ["-0.1", "1.1", "NaN", "true"],
    "presence_penalty": ["-2.1", "2.1", "NaN", '"0"', "true"],
    "frequency_penalty": ["-2.1", "2.1", "Infinity", "false"],
    "repetition_penalty": ["0", "-1", "11", "NaN", "true"],
    "seed": [str(2**63), str(-(2**63) - 1), "1.5", '"1"', "true", "1" + "0" * 400, "NaN"],
    "n": ["0", "-1", "129", "1.5", str(2**63), "true", '"2"', "1e400"],
    "max_tokens": ["-1", "1.5", str(2**31), str(2**63), "true", '"5"', "NaN"],
    "min_tokens": ["-1", str(2**63), "true", "1e1"],
    "stream": ["1", '"true"', "[]"],
    "ignore_eos": ["1", '"yes"'],
    "stream_options": ["1", "[]", '"x"'],
    "stop": ["1", "[1]", '[""]', "{}", "true", json.dumps(["x"] * 17), json.dumps("x" * 600), '"\\ud800"'],
    "stop_token_ids": ["5", "[-1]", '["1"]', "[true]", "[1.5]", json.dumps([1] * 129)],
    "logit_bias": [
        '{"\\ud800": 1}',
        "[]",
        "1",
        '{"a": 1}',
        '{"-1": 1}',
        '{"1": 101}',
        '{"1": NaN}',
        '{"1": true}',
        '{"1": "1"}',
    ],
    "model": ["1", "[]", json.dumps("x" * 600)],
    "user": ["1", "[]"],
    "metadata": ["[]", '{"a": 1}', '{"\\ud800": 1}', json.dumps({str(i): "" for i in range(17)})],
    "cache_salt": ["1", '"\\ud800"'],
}
CASES = [(field, value) for field, values in NUMBERS.items() for value in values]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_parameter_matrix(server: Server, path: str) -> None:
    """Over 200 values, none of which may reach the engine."""
    generated = server.metric("vllm:prompt_tokens_total")
    base = '"messages":[{"role":"user","content":"x"}]' if path == CHAT else '"prompt":"x"'
    wrong = []
    for field, value in CASES:
        body = f'{{{base},"{field}":{value}}}'.encode()
        response = server.http.post(path, content=body, headers={"content-type": "application/json"})
        try:
            error = check_error(response, 400, response.json()["error"]["param"])
            assert error["param"].split(".")[0].split("[")[0] == field, error
            assert field in error["message"], error
        except AssertionError as failure:
            wrong.append(f"{field}={value[:40]}: {failure}"[:300])
    assert not wrong, "\n".join(wrong)
    assert server.metric("vllm:prompt_tokens_total") == generated


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hi", "messages"),
        ([1], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"role": "alien", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0]"),
        ([{"role": "user", "content": None}], "messages[0]"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [IMAGE]}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls[0].id"),
        ([{"role": "user", "content": "x"}] * 5000, "messages"),
    ],
)
def test_messages(server: Server, messages: Any, param: str) -> None:
    check_error(server.post(CHAT, {} if messages is None else {"messages": messages}), 400, param)


def test_lone_surrogates(server: Server) -> None:
    content = rb'{"messages":[{"role":"user","content":"a\ud800b"}]}'
    response = server.http.post(CHAT, content=content, headers={"content-type": "application/json"})
    check_error(response, 400, "messages[0].content")
    response = server.http.post(
        COMPLETIONS, content=rb'{"prompt":"\udfff"}', headers={"content-type": "application/json"}
    )
    check_error(response, 400, "prompt")


@pytest.mark.parametrize(
    "prompt",
    [None, 5, [], [[]], [True], [1.5], [-1], [2**31], [1, "a"], ["a", 1], [["a"]], [[1], [-1]], ["x"] * 1100, {}],
)
def test_prompts(server: Server, prompt: Any) -> None:
    check_error(server.post(COMPLETIONS, {} if prompt is None else {"prompt": prompt}), 400, "prompt")


def test_ids_beyond_the_vocabulary(server: Server) -> None:
    for field, value in (
        ("prompt", [10**6]),
        ("stop_token_ids", [10**6]),
        ("logit_bias", {"1000000": 1}),
    ):
        check_error(server.post(COMPLETIONS, {"prompt": "x", field: value}), 400, field)
    check_error(server.post("/detokenize", {"tokens": [10**6]}), 400, "tokens")


NOT_HONOURED: dict[str, Any] = {
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "guided_json": {"type": "object"},
    "modalities": ["audio"],
    "chat_template": "x",
    "truncate_prompt_tokens": 5,
    "suffix": "x",
    "use_beam_search": True,
}


def test_what_is_not_honoured_is_refused_by_name(server: Server) -> None:
    for field, value in NOT_HONOURED.items():
        error = check_error(server.chat(**{field: value}), 400, field, "unsupported_parameter")
        assert field in error["message"]
    off: dict[str, Any] = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "stop": None,
    }
    accepted: dict[str, Any] = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "reasoning_effort": "none",
        "prediction": {"type": "content", "content": "x"},
    }
    answer = server.chat(max_tokens=1, **off, **accepted)
    assert answer.status_code == 200 and "x-unsupported-params" not in answer.headers


def test_an_assistants_message_may_be_sent_back(server: Server) -> None:
    message = server.chat(max_tokens=2).json()["choices"][0]["message"]
    nulls: dict[str, Any] = {"tool_calls": None, "function_call": None, "audio": None, "annotations": []}
    messages = [{"role": "user", "content": "x"}, {**message, **nulls}, {"role": "user", "content": "y"}]
    assert server.post(CHAT, {"messages": messages, "max_tokens": 1}).status_code == 200


def test_fields_that_contradict_each_other(server: Server) -> None:
    fields: dict[str, Any]
    for fields, param in (
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
        ({"continue_final_message": True}, "continue_final_message"),
    ):
        check_error(server.chat(**fields), 400, param)
    for fields, param in (
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 128, "prompt": ["x"] * 100}, "n"),
    ):
        check_error(server.post(COMPLETIONS, {"prompt": "x", **fields}), 400, param)


@pytest.mark.alone
def test_too_long_for_the_context(server: Server) -> None:
    limit = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
    ids = server.post("/tokenize", {"prompt": "x"}).json()["tokens"][-1:]
    for count in (limit, limit + 1, limit * 40):
        error = check_error(server.post(COMPLETIONS, {"prompt": ids * count}), 400, "prompt", "context_length_exceeded")
        assert f"maximum context length is {limit} tokens" in error["message"]
        assert error["n_prompt_tokens"] == count and error["n_ctx"] == limit
    fits = server.post(COMPLETIONS, {"prompt": ids * (limit - 1), "ignore_eos": True})
    assert fits.status_code == 200 and fits.json()["usage"]["total_tokens"] == limit
    started = time.monotonic()
    check_error(server.chat("word " * 400_000), 400, "messages", "context_length_exceeded")
    assert time.monotonic() - started < 3, "refused by its length, before it is encoded"


def test_what_max_tokens_asks_beyond_the_context_is_cut_and_said(server: Server, strict_server: Server) -> None:
    limit = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
    for most in (limit, 32_000, 2**31 - 1):
        for answer in (
            server.chat(max_tokens=most),
            server.chat(max_completion_tokens=most, max_tokens=1),
            server.chat(max_tokens=most, stream=True),
        ):
            assert answer.status_code == 200
            room = limit - server.chat(max_tokens=1).json()["usage"]["prompt_tokens"]
            assert answer.headers["x-max-tokens"] == str(room)
    assert "x-max-tokens" not in server.chat(max_tokens=room).headers
    answer = server.post(COMPLETIONS, {"prompt": ["x", "x x x x"], "max_tokens": limit, "ignore_eos": True})
    num_longest = server.post("/tokenize", {"prompt": "x x x x"}).json()["count"]
    assert answer.headers["x-max-tokens"] == str(limit - num_longest), "the least of what is left"
    for fields in ({"max_tokens": limit}, {"max_completion_tokens": limit, "max_tokens": 1}):
        check_error(strict_server.chat(**fields), 400, next(iter(fields)), "context_length_exceeded")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b"null", "invalid_json"),
        (b'{"messages": "\xff"}', "invalid_json"),
        (b"\xff\xfe{\x00}\x00", "invalid_json"),
        (b"[" * 60_000, "invalid_json"),
        (b'{"a":' * 30_000, "invalid_json"),
        (b'{"n": ' + b"1" * 5000 + b"}", "invalid_json"),
        (b"messages=hello", "invalid_json"),
    ],
)
def test_bodies_that_are_no_json(server: Server, content: bytes, code: str) -> None:
    response = server.http.post(CHAT, content=content, headers={"content-type": "application/json"})
    check_error(response, 400, None, code)


def test_content_types(server: Server) -> None:
    body = json.dumps(chat_body(max_tokens=1)).encode()
    for kind in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x", ""):
        error = check_error(server.http.post(CHAT, content=body, headers={"content-type": kind}), 400)
        assert "-H 'Content-Type: application/json'" in error["message"]
    charset = server.http.post(CHAT, content=body, headers={"content-type": "application/json; charset=utf-8"})
    assert charset.status_code == 200
    zipped = {"content-type": "application/json", "content-encoding": "gzip"}
    check_error(server.http.post(CHAT, content=body, headers=zipped), 415, None, "unsupported_content_encoding")


def test_unknown_places(server: Server) -> None:
    check_error(server.http.get("/v2/anything"), 404, None, "unknown_url")
    check_error(server.http.get("/v1/chat/completions/"), 404, None, "unknown_url")
    wrong = server.http.get(CHAT)
    check_error(wrong, 405, None, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    check_error(server.http.delete("/v1/models"), 405)
    check_error(server.chat(model="gpt-4"), 404, "model", "model_not_found")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/v1//chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/api/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/completions", "/v1/completions"),
        ("/v1/completion", "/v1/completions"),
        ("/models", "/v1/models"),
        ("/v1/models/", "/v1/models"),
        ("/models/vicuna/7B", "/v1/models/vicuna/7B"),
        ("/V1/Chat/Completions", "/v1/chat/completions"),
        ("/v1/tokenize", "/tokenize"),
        ("/v1/health", "/health"),
    ],
)
def test_the_usual_mistakes_are_told_the_right_url(server: Server, path: str, meant: str) -> None:
    method = "GET" if meant.startswith(("/v1/models", "/health")) else "POST"
    request = httpx.Request(method, f"http://127.0.0.1:{server.port}", json={} if method == "POST" else None)
    request.url = request.url.copy_with(raw_path=path.encode())  # as it is written, two slashes and all
    error = check_error(server.http.send(request), 404, None, "unknown_url")
    assert f"{method} {path}." in error["message"] and f"Did you mean {meant}?" in error["message"], error


def test_places_of_others_say_why_they_are_not_here(server: Server) -> None:
    for path, why in (("/v1/embeddings", "computes no embeddings"), ("/v1/audio/speech", "text only")):
        error = check_error(server.post(path, {"model": "demo", "input": "x"}), 404, None, "unsupported_endpoint")
        assert why in error["message"] and "Did you mean" not in error["message"]


def test_head_is_get_without_a_body(server: Server) -> None:
    for path in ("/health", "/ready", "/v1/models", "/version"):
        answer, asked = server.http.get(path), server.http.head(path)
        assert asked.status_code == 200 and asked.content == b""
        assert asked.headers["content-length"] == answer.headers["content-length"]
    assert server.http.get("/health").json() == {"status": "ok"}, "the connection is still in step"


@pytest.mark.alone
def test_a_flood_of_wrong_items_costs_little(server: Server) -> None:
    body = json.dumps({"messages": [1] * 150_000}).encode()
    started = time.monotonic()
    response = server.http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert time.monotonic() - started < 2
    check_error(response, 400, "messages[0]")
    keys: Any = {f"k{i}": i for i in range(60_000)}
    for field in ("logit_bias", "metadata"):
        started = time.monotonic()
        response = server.post(CHAT, chat_body(**{field: keys}))
        assert time.monotonic() - started < 3
        check_error(response, 400, response.json()["error"]["param"])
    started = time.monotonic()
    assert len(server.post(CHAT, chat_body(max_tokens=1) | keys).headers["x-unsupported-params"]) < 200
    assert time.monotonic() - started < 3


def test_nothing_of_it_left_a_traceback(server: Server) -> None:
    server.chat(max_tokens=1)
    assert "Traceback" not in server.log()


def test_other_methods(server: Server) -> None:
    """HEAD, OPTIONS and friends: an answer, never silence."""
    for method in ("HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"):
        assert server.http.request(method, CHAT).status_code == 405


def test_of_several_refused_fields_the_one_that_asks_is_named() -> None:
    """Not the first in the alphabet: whoever sends functions is not told about function_call."""
    with pytest.raises(ApiError) as refused:
        refuse({"function_call": "auto", "functions": [{"name": "f"}]})
    assert refused.value.error["param"] == "functions"


def test_unknown_fields_of_messages_and_parts_are_named(server: Server, strict_server: Server) -> None:
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y", "cache": 1, "a b": 2}]
    messages = [{"role": "user", "content": parts}, {"role": "user", "content": "x", "mood": "good", "tone": None}]
    for path, fields in ((CHAT, {"max_tokens": 1}), ("/tokenize", {})):
        answer = server.post(path, {"messages": messages, **fields})
        assert answer.status_code == 200, answer.text
        named = "messages[0].content[1].cache, messages[0].content[1].a?b, messages[1].mood"
        assert answer.headers["x-unsupported-params"] == named
        for message, name in zip(messages, ("content[1].cache", "mood"), strict=True):
            refused = strict_server.post(path, {"messages": [message]})
            check_error(refused, 400, f"messages[0].{name}", "unknown_parameter")
    many = [{"role": "user", "content": "x", **{f"k{i}": i for i in range(30)}}] * 30
    answer = server.post(CHAT, {"messages": many, "max_tokens": 1})
    assert answer.headers["x-unsupported-params"].count(",") == 15


def test_the_context_sentence_of_chat_speaks_of_messages(strict_server: Server) -> None:
    error = check_error(strict_server.chat(max_tokens=10**6), 400, "max_tokens", "context_length_exceeded")
    assert " in the messages, " in error["message"] and "length of the messages" in error["message"]
    asked = strict_server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 10**6})
    assert " in the prompt, " in check_error(asked, 400, "max_tokens", "context_length_exceeded")["message"]
