"""One submission and one mailbox per request: what is sent, what a reader gets, who has a place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gptq_api.engine.client import EngineDead, EngineStalled, Prompt
from gptq_api.engine.generation import Delta, Generation
from gptq_api.engine.places import PlacesTaken
from gptq_api.types import Abort, Add, SamplingParams, pack_ids
from tests.support.hand_fed_engine import HandFedEngine


def samples(num: int, max_tokens: int = 5) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=max_tokens, seed=seed) for seed in range(num)]


def reader(generation: Generation) -> AsyncIterator[list[Delta]]:
    return aiter(generation)


async def test_a_prompt_is_sent_once_for_all_its_samples() -> None:
    engine = HandFedEngine(max_queued_requests=16)
    first, second = Prompt([1, 2, 3], samples(8)), Prompt([4, 5], samples(2))
    with engine.submit([first, second], b"salt"):
        assert engine.sent == [
            Add(1, pack_ids([1, 2, 3]), tuple(first.params), b"salt"),
            Add(9, pack_ids([4, 5]), tuple(second.params), b"salt"),
        ]
        assert engine.num_admitted == 10
    assert engine.sent[2:] == [Abort(tuple(range(1, 11)))], "one message for all that were not finished"
    assert engine.num_admitted == 0
    with engine.submit([Prompt([6], samples(1))]):
        assert engine.sent[-1] == Add(11, pack_ids([6]), tuple(samples(1)))


async def test_all_samples_of_all_prompts_are_admitted_or_none() -> None:
    engine = HandFedEngine(max_queued_requests=8)
    with engine.submit([Prompt([1], samples(3))]):
        num_sent = len(engine.sent)
        with (
            pytest.raises(PlacesTaken, match=r"^3 of 8 requests are running or waiting"),
            engine.submit([Prompt([1], samples(3)), Prompt([2], samples(3))]),
        ):
            pass
        assert engine.num_admitted == 3 and len(engine.sent) == num_sent, "nothing was tried"
        with engine.submit([Prompt([1], samples(3)), Prompt([2], samples(2))]):
            assert engine.num_admitted == 8
        assert engine.num_admitted == 3


async def test_what_is_longer_than_the_context_is_refused_before_anything_is_sent() -> None:
    engine = HandFedEngine()
    with (
        pytest.raises(ValueError, match="prompt of 98 and answer of 5"),
        engine.submit([Prompt([1], samples(2)), Prompt([1] * 98, samples(2))]),
    ):
        pass
    assert not engine.sent and engine.num_admitted == 0


async def test_a_quick_reader_gets_the_news_of_a_step_together() -> None:
    engine = HandFedEngine()
    with engine.submit([Prompt([1, 2], samples(3))]) as generation:
        news = reader(generation)
        waiting = asyncio.ensure_future(anext(news))
        await asyncio.sleep(0)
        engine.step((1, 11), (2, 12), (3, 13), cached={1: 0, 2: 1, 3: 1})
        assert await waiting == [Delta(0, [11]), Delta(1, [12]), Delta(2, [13])]
        assert generation.num_cached_tokens == [0, 1, 1]
        engine.step((3, 23), finished={3: "stop"})
        assert await anext(news) == [Delta(2, [23], finish_reason="stop")]


async def test_tokens_of_a_slow_reader_merge_in_the_mailbox() -> None:
    engine = HandFedEngine()
    with engine.submit([Prompt([1, 2], samples(2))]) as generation:
        for token in range(100):
            engine.step((1, token), (2, -token))
        engine.step((1, 100), finished={1: "length", 2: "stop"})
        assert [deltas async for deltas in generation] == [
            [
                Delta(0, list(range(101)), finish_reason="length"),
                Delta(1, [-token for token in range(100)], finish_reason="stop"),
            ]
        ]


async def test_a_choice_that_is_closed_gives_its_place_back_while_the_others_go_on() -> None:
    engine = HandFedEngine(max_queued_requests=3)
    with engine.submit([Prompt([1, 2], samples(3))]) as generation:
        news = reader(generation)
        engine.step((1, 11), (2, 12), (3, 13))
        await anext(news)
        generation.close(1)
        assert engine.sent[-1] == Abort((2,)) and engine.num_admitted == 2
        with engine.submit([Prompt([9], samples(1))]):
            assert engine.num_admitted == 3
        engine.step((1, 21), (2, 22), (3, 23), finished={1: "length"})
        assert await anext(news) == [Delta(0, [21], finish_reason="length"), Delta(2, [23])], (
            "nothing of the closed one"
        )
        num_sent = len(engine.sent)
        generation.close(0)
        generation.close(0)
        assert len(engine.sent) == num_sent and engine.num_admitted == 1, "a finished one needs no abort"
        generation.close(2)
        with pytest.raises(StopAsyncIteration):
            await anext(news)
    assert engine.sent[num_sent:] == [Abort((3,))]


@pytest.mark.parametrize("read", [True, False])
async def test_the_end_of_the_engine_is_told_once_after_what_came_before(read: bool) -> None:
    engine = HandFedEngine()
    with engine.submit([Prompt([1, 2], samples(3))]) as generation:
        news = reader(generation)
        waiting = asyncio.ensure_future(anext(news))
        await asyncio.sleep(0)
        engine.step((1, 11), finished={1: "length"})
        if read:
            assert await waiting == [Delta(0, [11], finish_reason="length")]
        engine.die()
        engine.die()
        if not read:
            assert await waiting == [Delta(0, [11], finish_reason="length")]
        with pytest.raises(EngineDead):
            await anext(news)
        with pytest.raises(StopAsyncIteration):
            await anext(news)
    assert engine.num_admitted == 0 and len(engine.sent) == 1, "nobody is there to be told of the abort"


async def test_who_has_everything_is_not_told_of_the_end_of_the_engine() -> None:
    engine = HandFedEngine()
    with engine.submit([Prompt([1, 2], samples(2))]) as generation:
        engine.step((1, 11), (2, 12), finished={1: "length", 2: "length"})
        engine.die()
        assert len([deltas async for deltas in generation]) == 1


async def test_silence_gives_all_unfinished_choices_up_at_once() -> None:
    engine = HandFedEngine(engine_timeout_s=0.05)
    with engine.submit([Prompt([1, 2], samples(3))]) as generation:
        engine.step((1, 11), finished={1: "length"})
        with pytest.raises(EngineStalled):
            async for deltas in generation:
                assert deltas == [Delta(0, [11], finish_reason="length")]
        assert engine.num_admitted == 1, "the finished one's, which its reader still has"
        assert engine.sent[1:] == [Abort((2, 3))]
    assert engine.num_admitted == 0 and len(engine.sent) == 2
