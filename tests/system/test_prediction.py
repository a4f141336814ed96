"""Predicted outputs over HTTP: the answer is the one that comes without them, in fewer steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.server import Server, chat_body, check_error

CHAT = "/v1/chat/completions"
QUESTION = "What is a GPTQ checkpoint?"


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    with Server("--speculate", "off") as running:
        yield running


def predicted(text: str) -> dict[str, Any]:
    return {"prediction": {"type": "content", "content": text}}


def test_a_copy_comes_in_fewer_steps(server: Server, plain: Server) -> None:
    """An answer is asked for again with itself as the prediction, but for a word in its middle."""
    body = chat_body(QUESTION, temperature=0, max_tokens=80, logprobs=True)
    answers = [plain.post(CHAT, body | more).json() for more in ({}, predicted("x"))]
    text = answers[0]["choices"][0]["message"]["content"]
    words = text.split(" ")
    words[len(words) // 2] = "elsewhere"
    answers.append(server.post(CHAT, body | predicted(" ".join(words))).json())
    assert [answer["choices"] for answer in answers[1:]] == [answers[0]["choices"]] * 2
    assert len({answer["usage"]["completion_tokens"] for answer in answers}) == 1


def test_what_is_malformed_is_a_400(server: Server) -> None:
    error = check_error(server.chat(prediction={"type": "content"}), 400, "prediction.content")
    assert error["code"] == "missing_required_parameter"
    check_error(server.chat(prediction="x"), 400, "prediction")
    assert server.chat(max_tokens=1, **predicted("word " * 200_000)).status_code == 200, "cut, and not refused"
