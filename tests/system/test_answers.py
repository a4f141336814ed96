"""From what the engine says to what a client gets, without either: pieces, formats and the two ways out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest

from gptq_api.api.answers.choice import Piece
from gptq_api.api.answers.formats import ChatFormat, CompletionFormat, Format, Head, Told, UsageEvents
from gptq_api.api.answers.respond import whole
from gptq_api.api.answers.stream import events
from gptq_api.api.answers.work import Work, admitted
from gptq_api.api.errors import ApiError
from gptq_api.api.service import Service
from gptq_api.api.terms import Terms
from gptq_api.edge.request_log import RequestRecord
from gptq_api.engine.client import Prompt
from gptq_api.text.folder import checkpoint_folder
from gptq_api.text.process import TextProcess
from gptq_api.text.stream import TextStream
from gptq_api.text.tokenizer import Tokenizer, load_tokenizer
from gptq_api.types import Abort, SamplingParams
from tests.support.hand_fed_engine import HandFedEngine

HEAD = Head("id-1", 1, "demo", "fp")
DETAILS = ("reasoning_tokens", "audio_tokens", "accepted_prediction_tokens", "rejected_prediction_tokens")
NO_USAGE = UsageEvents(at_end=False, in_chunks=False)


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(checkpoint_folder("demo"))


def ids(text: str) -> list[int]:
    return tokenizer().encode(text)


@contextmanager
def work_of(engine: HandFedEngine, num_samples: int, stop: tuple[str, ...] = ()) -> Iterator[Work]:
    service = Service(engine.settings, engine, TextProcess(checkpoint_folder("demo")), tokenizer(), None, "demo")  # type: ignore[arg-type]
    prompt = Prompt([1, 2, 3], [SamplingParams(max_tokens=20, seed=seed) for seed in range(num_samples)])
    new_text = partial(TextStream, tokenizer(), stop=stop, continues=True)
    with admitted(service, RequestRecord("req"), [prompt], new_text, Terms()) as work:
        yield work
    service.close()


async def item(stream: AsyncIterator[bytes]) -> list[Any]:
    """The JSON of the next item's events."""
    data = (await anext(stream)).removesuffix(b"\n\n")
    return [event if event == b"data: [DONE]" else json.loads(event[6:]) for event in data.split(b"\n\n")]


async def test_what_a_step_brings_to_all_choices_is_one_item() -> None:
    engine = HandFedEngine()
    with work_of(engine, 3) as work:
        stream = events(work, ChatFormat(HEAD, 3, UsageEvents(at_end=True, in_chunks=False), None))
        assert [event["choices"][0]["delta"] for event in await item(stream)] == [
            {"role": "assistant", "content": ""}
        ] * 3
        num_tasks = len(asyncio.all_tasks())
        for token in ids("one two three"):
            engine.step((1, token), (2, token), (3, token))
            found = await item(stream)
            assert [event["choices"][0]["index"] for event in found] == [0, 1, 2]
            assert len(asyncio.all_tasks()) == num_tasks
        engine.step(finished={1: "length", 2: "stop", 3: "length"})
        *ends, usage, done = await item(stream)
        assert [event["choices"][0]["finish_reason"] for event in ends] == ["length", "stop", "length"]
        assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 3 * len(ids("one two three"))
        assert done == b"data: [DONE]"
    assert work.outcome == "done"


async def test_a_stop_string_ends_one_choice_and_the_others_go_on() -> None:
    engine = HandFedEngine()
    with work_of(engine, 2, stop=("two",)) as work:
        for token in ids("one two three"):
            engine.step((1, token), (2, ids("a")[0]))
        stream = events(work, CompletionFormat(HEAD, 2, NO_USAGE, None, ["", ""]))
        found = await item(stream)
        texts = "".join(event["choices"][0]["text"] for event in found if event["choices"][0]["index"] == 0)
        assert texts.strip() == "one" and found[1]["choices"][0]["finish_reason"] == "stop"
        assert engine.sent[1:] == [Abort((1,))] and engine.num_admitted == 1
    assert engine.sent[2:] == [Abort((2,))]


@pytest.mark.parametrize("way", ["stream", "whole"])
async def test_at_its_deadline_an_answer_ends_where_it_is(way: str) -> None:
    engine = HandFedEngine()
    with work_of(engine, 3) as work:
        token = ids("one")[0]
        engine.step((1, token), (2, token), finished={2: "stop"})
        work.expire()
        engine.step((1, token), (3, token))  # too late
        assert engine.sent[1:] == [Abort((1, 3))]
        shape = CompletionFormat(HEAD, 3, NO_USAGE, None, [""] * 3)
        if way == "whole":
            choices = (await whole(work, shape))["choices"]
        else:
            told = [event for event in await item(events(work, shape)) if event != b"data: [DONE]"]
            choices = [event["choices"][0] for event in told if event["choices"][0]["finish_reason"]]
            choices.sort(key=lambda choice: int(choice["index"]))
        ends = [(choice["finish_reason"], choice.get("stop_reason")) for choice in choices]
        assert ends == [("length", "deadline"), ("stop", None), ("length", "deadline")]
        assert work.num_completion_tokens == 2
    assert work.outcome == "deadline" and work.service.metrics.cancelled["deadline"]._value.get() == 1


async def test_a_deadline_before_the_first_token_is_an_error() -> None:
    engine = HandFedEngine()
    with work_of(engine, 2) as work:
        work.expire()
        with pytest.raises(ApiError) as told:
            await whole(work, CompletionFormat(HEAD, 2, NO_USAGE, None, ["", ""]))
        assert told.value.status_code == 504 and told.value.error["code"] == "deadline_exceeded"
        assert told.value.headers == {"x-should-retry": "false"}
    with work_of(engine, 1) as work:
        work.expire()
        stream = events(work, ChatFormat(HEAD, 1, NO_USAGE, None))
        await item(stream)
        error, done = await item(stream)
        assert error["error"]["code"] == "deadline_exceeded" and done == b"data: [DONE]"
    assert work.outcome == "deadline" and engine.num_admitted == 0


async def test_a_deadline_after_the_end_changes_nothing() -> None:
    engine = HandFedEngine()
    with work_of(engine, 1) as work:
        engine.step((1, ids("one")[0]), finished={1: "length"})
        work.expire()
        answer = await whole(work, CompletionFormat(HEAD, 1, NO_USAGE, None, [""]))
        assert answer["choices"][0].get("stop_reason") is None
    assert work.outcome == "done"


@pytest.mark.parametrize("way", ["stream", "whole"])
async def test_a_sequence_that_is_given_up_takes_the_answer_with_it(way: str) -> None:
    engine = HandFedEngine()
    with work_of(engine, 2) as work:
        token = ids("one")[0]
        engine.step((1, token), (2, token), finished={2: "error"})
        shape = ChatFormat(HEAD, 2, NO_USAGE, None)
        if way == "whole":
            with pytest.raises(ApiError) as told:
                await whole(work, shape)
            assert told.value.status_code == 500 and told.value.error["code"] == "generation_failed"
        else:
            stream = events(work, shape)
            await item(stream)
            assert len(await item(stream)) == 2, "the text that came before"
            error, done = await item(stream)
            assert error["error"]["code"] == "generation_failed" and done == b"data: [DONE]"
    assert work.outcome == "error" and engine.num_admitted == 0 and engine.sent[1:] == [Abort((1,))]


class Shout(Format):
    """An endpoint nobody has."""

    kind = chunk_kind = "shout"

    def first(self, index: int) -> bytes:
        return b""

    def text(self, piece: Piece) -> bytes:
        return json.dumps({"shout": piece.text.upper()}).encode()

    def last(self, piece: Piece) -> bytes:
        return b'{"shout":"!"}'

    def said(self, index: int, told: Told) -> dict[str, Any]:
        return {"shout": told.text.upper()}


@pytest.mark.parametrize("way", ["stream", "whole"])
async def test_a_new_endpoint_is_a_format(way: str) -> None:
    engine = HandFedEngine()
    with work_of(engine, 1) as work:
        engine.step(*((1, token) for token in ids("one two")), finished={1: "length"}, cached={1: 2})
        shape = Shout(HEAD, 1, NO_USAGE, None)
        if way == "whole":
            answer = await whole(work, shape)
            assert answer["object"] == "shout" and answer["choices"][0]["shout"].strip() == "ONE TWO"
            assert answer["usage"] == {
                "prompt_tokens": 3,
                "completion_tokens": len(ids("one two")),
                "total_tokens": 3 + len(ids("one two")),
                "prompt_tokens_details": {"cached_tokens": 2, "audio_tokens": 0},
                "completion_tokens_details": dict.fromkeys(DETAILS, 0),
            }
        else:
            text, end, done = await item(events(work, shape))
            assert text["choices"][0]["shout"].strip() == "ONE TWO" and end["choices"] == [{"shout": "!"}]
            assert done == b"data: [DONE]"
