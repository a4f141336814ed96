"""Models that think in <think> before they speak: their thoughts are `reasoning_content`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.server import Server, chat_body, stream_chunks
from tests.support.spelling_model import TEMPLATE, write

THOUGHTS, WORDS = "Hm, that is six times seven.", "It is 42, of course."


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("thinker")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE + "{# answers begin with <think> #}")
    (folder / "model").mkdir()
    model = write(folder / "model", f"<think>{THOUGHTS}</think>\n\n{WORDS}")
    with Server("--model-path", str(model), "--chat-template", str(template)) as server:
        yield server


def test_thoughts_and_words_are_apart(thinker: Server) -> None:
    answer = thinker.chat("What is it?", temperature=0, max_tokens=100).json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (THOUGHTS, WORDS)
    num_thoughts = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < num_thoughts < answer["usage"]["completion_tokens"]


def test_a_stream_tells_thoughts_first(thinker: Server) -> None:
    body = chat_body("What is it?", temperature=0, max_tokens=100, logprobs=True)
    choices = [chunk["choices"][0] for chunk in stream_chunks(thinker, body)]
    thoughts = [choice["delta"].get("reasoning_content", "") for choice in choices]
    words = [choice["delta"].get("content") or "" for choice in choices]
    assert ("".join(thoughts), "".join(words)) == (THOUGHTS, WORDS)
    last_thought = max(i for i, text in enumerate(thoughts) if text)
    first_word = min(i for i, text in enumerate(words) if text)
    assert last_thought < first_word and choices[-1]["finish_reason"] == "stop"
    whole = thinker.post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    told = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert [entry["token"] for entry in told] == [entry["token"] for entry in whole]


def test_a_stop_text_counts_in_words_alone(thinker: Server) -> None:
    choice = thinker.chat("What is it?", temperature=0, max_tokens=100, stop=["six", " of"]).json()["choices"][0]
    assert choice["message"]["reasoning_content"] == THOUGHTS
    assert choice["message"]["content"] == "It is 42," and choice["finish_reason"] == "stop"


def test_thoughts_may_come_back(thinker: Server) -> None:
    for name in ("reasoning_content", "reasoning"):
        past = {"role": "assistant", "content": WORDS, name: THOUGHTS}
        messages = [{"role": "user", "content": "Hi"}, past, {"role": "user", "content": "Why?"}]
        answer = thinker.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 100})
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == WORDS
        assert "x-unsupported-params" not in answer.headers
