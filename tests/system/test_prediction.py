"""Predicted outputs over HTTP: the answer is the one that comes without them, in fewer steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.server import Server, chat_body, check_error, stream_chunks

CHAT = "/v1/chat/completions"
QUESTION = "What is a GPTQ checkpoint?"


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    with Server("--speculate", "off") as running:
        yield running


METRICS = [f"vllm:spec_decode_num_{name}_total" for name in ("drafts", "draft_tokens", "accepted_tokens")]


def text_of(choice: dict[str, Any]) -> str:
    text: str = choice["message"]["content"] if "message" in choice else choice["text"]
    return text


def accepted(usage: dict[str, Any]) -> tuple[int, int]:
    details = usage["completion_tokens_details"]
    return details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]


def predicted(text: str) -> dict[str, Any]:
    return {"prediction": {"type": "content", "content": text}}


def test_a_copy_comes_in_fewer_steps(server: Server, plain: Server) -> None:
    """An answer is asked for again with itself as the prediction, but for a word in its middle."""
    body = chat_body(QUESTION, temperature=0, max_tokens=80, logprobs=True, cache_salt="a copy")
    answers = [plain.post(CHAT, body | more).json() for more in ({}, predicted("x"))]
    text = answers[0]["choices"][0]["message"]["content"]
    words = text.split(" ")
    words[len(words) // 2] = "elsewhere"
    before = [server.metric(name) for name in METRICS]
    answers.append(server.post(CHAT, body | predicted(" ".join(words))).json())
    assert [answer["choices"] for answer in answers[1:]] == [answers[0]["choices"]] * 2
    assert len({answer["usage"]["completion_tokens"] for answer in answers}) == 1
    assert [accepted(answer["usage"]) for answer in answers[:2]] == [(0, 0), (0, 0)]
    right, wrong = accepted(answers[2]["usage"])
    assert 0 < right < answers[2]["usage"]["completion_tokens"]
    drafts, drafted, taken = (server.metric(name) - old for name, old in zip(METRICS, before, strict=True))
    assert drafted >= right + wrong and taken >= right and 0 < drafts <= drafted
    assert sum(plain.metric(name) for name in METRICS) == 0


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_stream_and_samples_tell_what_was_accepted(server: Server, path: str) -> None:
    """Sampled by a seed, with a stop string in the middle: the same as without, and usage counts what is shown."""
    body: dict[str, Any] = {"temperature": 0.7, "seed": 5, "max_tokens": 60, "n": 2, "cache_salt": path}
    body |= chat_body(QUESTION) if path == CHAT else {"prompt": "A checkpoint is"}
    plain = server.post(path, body).json()
    texts = [text_of(choice) for choice in plain["choices"]]
    body |= {"stop": texts[0][len(texts[0]) // 2 :][:6], "cache_salt": path + " again"} | predicted(texts[0])
    whole = server.post(path, body).json()
    assert text_of(whole["choices"][0]) == texts[0][: texts[0].index(body["stop"])]
    assert whole["choices"][0]["finish_reason"] == "stop"
    body |= {"cache_salt": path + " streamed", "stream_options": {"include_usage": True}}
    chunks = stream_chunks(server, body, path)
    streamed = ["", ""]
    for chunk in chunks[:-1]:
        choice = chunk["choices"][0]
        streamed[choice["index"]] += choice["delta"].get("content", "") if path == CHAT else choice["text"]
    assert streamed == [text_of(choice) for choice in whole["choices"]]
    for usage in (whole["usage"], chunks[-1]["usage"]):
        assert 0 < accepted(usage)[0] < usage["completion_tokens"] == whole["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0, "logprobs": True, "top_logprobs": 3},
        {"temperature": 0.9, "seed": 7, "logprobs": True, "top_logprobs": 0, "top_p": 0.9},
        {"temperature": 1.3, "seed": 8, "min_p": 0.01, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
        {"temperature": 0, "min_tokens": 70, "logit_bias": {"100": 3}, "presence_penalty": 0.3},
        {"temperature": 0, "stop": [" the"], "include_stop_str_in_output": True, "logprobs": True},
        {"temperature": 0, "ignore_eos": True, "max_tokens": 37, "n": 2},
    ],
    ids=lambda more: "-".join(more),
)
def test_what_is_drafted_from_the_last_answer_changes_nothing(
    server: Server, plain: Server, more: dict[str, Any]
) -> None:
    """Asked twice; the second time the answer is known, to its end or to where it is cut off."""
    body = chat_body(QUESTION, **{"max_tokens": 80, "cache_salt": str(more), **more})
    before = server.metric(METRICS[2])
    first, second, wanted = server.post(CHAT, body), server.post(CHAT, body), plain.post(CHAT, body)
    assert server.metric(METRICS[2]) > before
    answers = [answer.json() for answer in (first, second, wanted)]
    for answer in answers:
        answer["usage"].pop("prompt_tokens_details")
    assert [(answer["choices"], answer["usage"]) for answer in answers[:2]] == [
        (answers[2]["choices"], answers[2]["usage"])
    ] * 2


def test_what_is_malformed_is_a_400(server: Server) -> None:
    error = check_error(server.chat(prediction={"type": "content"}), 400, "prediction.content")
    assert error["code"] == "missing_required_parameter"
    check_error(server.chat(prediction="x"), 400, "prediction")
    assert server.chat(max_tokens=1, **predicted("word " * 200_000)).status_code == 200, "cut, and not refused"
