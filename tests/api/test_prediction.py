"""OpenAI's `prediction`: what is malformed, what reaches the engine, and what usage says of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from gptq_api.api.answers.formats import ChatFormat, CompletionFormat, Head, UsageEvents
from gptq_api.api.answers.logprobs import chat_logprobs
from gptq_api.api.answers.respond import whole
from gptq_api.api.answers.stream import events
from gptq_api.api.answers.work import Work, admitted
from gptq_api.api.errors import ApiError
from gptq_api.api.requests.chat import ChatCompletionRequest
from gptq_api.api.requests.completions import CompletionRequest
from gptq_api.api.requests.prompts import chat_prompt, completion_prompts
from gptq_api.api.requests.translated import Names, chat_request
from gptq_api.api.service import Service
from gptq_api.api.speed import SpeedLine
from gptq_api.api.terms import Terms
from gptq_api.edge.request_log import RequestRecord
from gptq_api.engine.client import Prompt
from gptq_api.text.folder import checkpoint_folder
from gptq_api.text.process import TextProcess
from gptq_api.text.stream import TextStream
from gptq_api.types import Add, EngineStats, SamplingParams, StepOutput, TokenLogprobs, pack_ids, unpack_ids
from tests.support.agents import tokenizer
from tests.support.hand_fed_engine import HandFedEngine

HEAD = Head("id-1", 1, "demo", "fp")
MESSAGES = {"messages": [{"role": "user", "content": "x"}]}


def request(prediction: Any, **fields: Any) -> ChatCompletionRequest:
    return chat_request({**MESSAGES, "prediction": prediction, **fields}, Names())


@pytest.mark.parametrize(
    ("wrong", "param", "reason"),
    [
        ("x", "prediction", "it must be an object, got a string"),
        (["x"], "prediction", "it must be an object, got an array"),
        ({}, "prediction.type", "Missing required parameter"),
        ({"type": "content"}, "prediction.content", "Missing required parameter"),
        ({"type": "content", "content": None}, "prediction.content", "it must be a string or an array"),
        (
            {"type": "content", "content": 5},
            "prediction.content",
            "it must be a string or an array of text parts, got 5",
        ),
        ({"type": "tokens", "content": "x"}, "prediction.type", "it must be 'content', got 'tokens'"),
        ({"type": "content", "content": [{"type": "image_url"}]}, "prediction.content", 'only parts of type "text"'),
        ({"type": "content", "content": [{"type": "text"}]}, "prediction.content", 'a text part needs a string "text"'),
        ({"type": "content", "content": "\ud800"}, "prediction.content", "half of a surrogate pair"),
    ],
)
def test_what_is_malformed_is_named(wrong: Any, param: str, reason: str) -> None:
    with pytest.raises(ApiError) as told:
        request(wrong)
    assert told.value.status_code == 400 and told.value.error["param"] == param
    assert reason in told.value.error["message"], told.value.error["message"]


def test_what_nobody_knows_in_it_is_said() -> None:
    body = request({"type": "content", "content": [{"type": "text", "text": "x", "y": 1}], "z": 2})
    assert body.unknown(strict=False) == ["prediction.z", "prediction.content[0].y"]
    for prediction in (
        {"type": "content", "content": "x", "z": 2},
        {"type": "content", "content": [{"type": "text", "text": "x", "y": 1}]},
    ):
        with pytest.raises(ApiError):
            request(prediction).unknown(strict=True)


@contextmanager
def served(**ready: Any) -> Iterator[tuple[Service, HandFedEngine]]:
    engine = HandFedEngine()
    known = {"vocab_size": 10**6, "eos_token_ids": (0,), **ready}
    engine.ready = SimpleNamespace(**{**vars(engine.ready), **known})  # type: ignore[assignment]
    text = TextProcess(checkpoint_folder("demo"))
    service = Service(engine.settings, engine, text, tokenizer(), None, "demo")  # type: ignore[arg-type]
    try:
        yield service, engine
    finally:
        text.close()
        service.close()


async def test_it_is_encoded_as_an_answer_and_cut_to_the_context() -> None:
    file = "def one():\n    return 1  # </s>\n"
    with served() as (service, _):
        _, service.template = await service.text.start()

        async def predicted(content: Any, **fields: Any) -> list[int]:
            prompt, _ = await chat_prompt(service, request({"type": "content", "content": content}, **fields))
            return unpack_ids(prompt.prediction)

        assert await predicted(file) == tokenizer().encode(file), "no BOS, and no control token by its name"
        assert await predicted([{"type": "text", "text": part} for part in file.split("\n")]) == tokenizer().encode(
            file
        )
        assert await predicted("") == []
        long = await predicted("word " * 10**6)
        assert len(long) == service.max_tokens and long == tokenizer().encode("word " * 200)[: service.max_tokens]
        beside = {"n": 3, "logprobs": True, "stop": "x", "presence_penalty": 1.0, "max_completion_tokens": 5}
        assert await predicted(file, **beside) == tokenizer().encode(file)
        body = CompletionRequest.model_validate(
            {"prompt": ["a", "b"], "prediction": {"type": "content", "content": file}}
        )
        for prompt in await completion_prompts(service, body):
            assert unpack_ids(prompt.prediction) == tokenizer().encode(file)
        service.settings = service.settings.model_copy(update={"speculate": "off"})
        assert await predicted(file) == []


async def test_ids_without_a_row_are_left_out() -> None:
    ids = tokenizer().encode("one two three")
    middle = sorted(ids)[len(ids) // 2]
    with served(vocab_size=middle) as (service, _):
        await service.text.start()
        body = CompletionRequest.model_validate(
            {"prompt": [1], "prediction": {"type": "content", "content": "one two three"}}
        )
        (prompt,) = await completion_prompts(service, body)
        assert unpack_ids(prompt.prediction) == [token_id for token_id in ids if token_id < middle]


@contextmanager
def work_of(engine: HandFedEngine, num_samples: int = 1, stop: tuple[str, ...] = ()) -> Iterator[Work]:
    service = Service(engine.settings, engine, TextProcess(checkpoint_folder("demo")), tokenizer(), None, "demo")  # type: ignore[arg-type]
    params = [SamplingParams(max_tokens=20, seed=seed, top_logprobs=0) for seed in range(num_samples)]
    prompt = Prompt([1, 2, 3], params, pack_ids([7, 8, 9]))
    new_text = partial(TextStream, tokenizer(), stop=stop, continues=True)
    with admitted(service, RequestRecord("req"), [prompt], new_text, Terms()) as work:
        yield work
    service.close()


def step(engine: HandFedEngine, *tokens: tuple[int, int], **more: Any) -> None:
    """One whose tokens have a logprob each: minus their id."""
    told = {i: TokenLogprobs(-float(token), []) for i, (_, token) in enumerate(tokens)}
    engine.step(*tokens, logprobs=told, **more)


def accepted(usage: dict[str, Any]) -> tuple[int, int]:
    details = usage["completion_tokens_details"]
    return details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]


async def item(stream: AsyncIterator[bytes]) -> list[Any]:
    data = (await anext(stream)).removesuffix(b"data: [DONE]\n\n")
    return [json.loads(event[6:]) for event in data.split(b"\n\n") if event]


async def test_all_samples_share_it_and_usage_adds_up() -> None:
    engine = HandFedEngine()
    ids = tokenizer().encode("one two three four")
    with work_of(engine, 2) as work:
        assert isinstance(engine.sent[0], Add)
        assert unpack_ids(engine.sent[0].prediction) == [7, 8, 9] and len(engine.sent[0].params) == 2
        step(engine, *((1, token) for token in ids), (2, ids[0]), drafted={1: (3, 1), 2: (0, 4)}, predicted={1: (2, 0)})
        last = {"drafted": {2: (0, 8)}, "predicted": {2: (0, 4)}}
        step(engine, (2, ids[1]), finished={1: "length", 2: "length"}, **last)
        answer = await whole(work, CompletionFormat(HEAD, 2, UsageEvents(False, False), None, ["", ""]))
        assert accepted(answer["usage"]) == (2, 4), "what was drafted from other texts is none of it"
        assert answer["usage"]["completion_tokens"] == len(ids) + 2, "drafts are none"
    assert work.record.notes["tokens_drafted"] == 12 and work.record.notes["tokens_accepted"] == 3


async def test_a_stream_tells_what_came_of_it_at_its_end_and_in_chunks() -> None:
    engine = HandFedEngine()
    ids = tokenizer().encode("one two three four")
    told = {1: (len(ids) - 2, 2)}
    with work_of(engine) as work:
        shape = ChatFormat(HEAD, 1, UsageEvents(True, True), partial(chat_logprobs, tokenizer(), num_top=0))
        stream = events(work, shape)
        await item(stream)
        step(engine, (1, ids[0]))
        (chunk,) = await item(stream)
        assert accepted(chunk["usage"]) == (0, 0)
        step(engine, *((1, token) for token in ids[1:]), drafted=told, predicted=told)
        (chunk,) = await item(stream)
        assert accepted(chunk["usage"]) == told[1], "one chunk for a run"
        text, first = tokenizer().decode(ids), tokenizer().decode(ids[:1])
        assert chunk["choices"][0]["delta"]["content"] == text.removeprefix(first)
        entries = chunk["choices"][0]["logprobs"]["content"]
        assert [entry["logprob"] for entry in entries] == [-float(token) for token in ids[1:]]
        engine.step(finished={1: "length"})
        *_, usage = await item(stream)
        assert usage["choices"] == [] and accepted(usage["usage"]) == told[1]
        assert usage["usage"]["completion_tokens"] == len(ids)


@pytest.mark.parametrize("way", ["stream", "whole"])
async def test_a_stop_string_inside_a_run_ends_text_logprobs_and_bill(way: str) -> None:
    engine = HandFedEngine()
    ids = tokenizer().encode("one two three four five six")
    with work_of(engine, stop=(" three",)) as work:
        shape = ChatFormat(HEAD, 1, UsageEvents(True, False), partial(chat_logprobs, tokenizer(), num_top=0))
        step(engine, *((1, token) for token in ids), drafted={1: (len(ids) - 1, 1)}, predicted={1: (len(ids) - 1, 1)})
        if way == "whole":
            answer = await whole(work, shape)
            text, told = answer["choices"][0]["message"]["content"], answer["choices"][0]["logprobs"]["content"]
            usage, ends = answer["usage"], answer["choices"][0]["finish_reason"]
        else:
            chunks = [chunk async for data in events(work, shape) for chunk in await item(_once(data))]
            choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
            text = "".join(choice["delta"].get("content") or "" for choice in choices)
            told = [entry for choice in choices for entry in (choice["logprobs"] or {}).get("content", ())]
            usage, ends = chunks[-1]["usage"], choices[-1]["finish_reason"]
        assert text == "one two" and ends == "stop"
        num = usage["completion_tokens"]
        assert tokenizer().decode(ids[:num]).endswith(" three") and num < len(ids)
        assert [entry["logprob"] for entry in told] == [-float(token) for token in ids[: len(told)]]
        assert "".join(entry["token"] for entry in told).strip() == "one two"
        assert accepted(usage) == (num, 1), "what stands behind it is nobody's"


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def test_metrics_and_the_speed_line_count_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptq_api.api.speed.PERIOD_S", 0.01)

    def told(num_computed: int, num_tokens: int, drafts: int, drafted: int, accepted: int) -> StepOutput:
        stats = EngineStats(1, 0, 8, 9, 0, 0, 0, num_computed, 0, 0, drafts, drafted, accepted)
        ids = pack_ids([1] * num_tokens)
        return StepOutput(sequence_ids=ids, tokens=ids, finished={}, cached_tokens={}, logprobs={}, stats=stats)

    with capture_logs() as said:
        speed = SpeedLine(HandFedEngine())
        speed.on_step(told(8, 3, 1, 7, 2))
        speed.on_step(told(8, 8, 2, 14, 9))
        while not said:
            await asyncio.sleep(0.01)
    assert said[0]["prompt_tok_s"] == 0, "rows of drafts are none of a prompt"
    assert said[0]["drafts_accepted_pct"] == pytest.approx(100 * 9 / 14, abs=0.1)
    with served() as (service, engine):
        engine._deliver(told(0, 0, 2, 14, 9))
        engine.die()
        text = service.metrics.render().decode()
        for name, value in (("drafts", 2), ("draft_tokens", 14), ("accepted_tokens", 9)):
            assert f'vllm:spec_decode_num_{name}_total{{engine="0",model_name="demo"}} {value}.0' in text, (
                "they outlive an engine"
            )
