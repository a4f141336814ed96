"""What a request makes of its prompts' log-probabilities, whatever comes first."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

import pytest

from gptq_api.api.answers.choice import Piece
from gptq_api.api.answers.logprobs import token_text
from gptq_api.api.answers.prompt_logprobs import Scoring, text_offsets
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
from gptq_api.types import PromptLogprobs, SamplingParams, pack_ids
from tests.support.hand_fed_engine import HandFedEngine

IDS = [5, 600, 700, 701]


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(checkpoint_folder("demo"))


def told(first: int, *logprobs: float) -> PromptLogprobs:
    """Each token is the likeliest, and token 9 comes behind it."""
    ids = [token for i in range(len(logprobs)) for token in (IDS[first + i], 9)]
    tops = [value for logprob in logprobs for value in (logprob, -20.0)]
    columns = (array("f", logprobs).tobytes(), pack_ids([1] * len(logprobs)), pack_ids(ids), array("f", tops).tobytes())
    return PromptLogprobs(first, *columns)


@contextmanager
def work_of(engine: HandFedEngine, num_prompts: int = 1, num_samples: int = 2) -> Iterator[Work]:
    service = Service(engine.settings, engine, TextProcess(checkpoint_folder("demo")), tokenizer(), None, "demo")  # type: ignore[arg-type]
    prompts = [Prompt(IDS, [SamplingParams(max_tokens=20)] * num_samples) for _ in range(num_prompts)]
    scoring = Scoring(service, prompts, ["echo"] * num_prompts, 2, 1)
    new_text = partial(TextStream, tokenizer(), continues=True)
    with admitted(service, RequestRecord("req"), prompts, new_text, Terms(), scoring=scoring) as work:
        yield work
    service.close()


def texts(pieces: list[Piece]) -> dict[int, str]:
    found: dict[int, str] = {}
    for piece in pieces:
        found[piece.choice.index] = found.get(piece.choice.index, "") + piece.text
    return found


async def test_nothing_is_said_of_a_choice_before_its_prompt_is_told() -> None:
    engine = HandFedEngine()
    with work_of(engine) as work:
        pieces = aiter(work.pieces())
        engine.step((2, 800), prompt_logprobs={1: told(1, -1.0)})
        engine.step((2, 801), (2, 802), prompt_logprobs={1: told(2, -2.0, -3.0)})
        text = tokenizer().decode([800, 801, 802])
        assert texts(await anext(pieces)) == {1: text}
        engine.step((1, 803), finished={1: "length", 2: "length"})
        assert work.scoring is not None and not work.scoring.is_waiting
        assert texts(await anext(pieces))[0] == tokenizer().decode([803])
        (prompt,) = work.scoring.prompts
        names = [token_text(tokenizer(), token) for token in IDS]
        assert prompt.echo is not None and prompt.listed is not None
        assert prompt.echo["tokens"] == names and prompt.echo["token_logprobs"] == [None, -1.0, -2.0, -3.0]
        assert prompt.echo["top_logprobs"] == [
            None,
            *({name: -1.0 * i, token_text(tokenizer(), 9): -20.0} for i, name in enumerate(names) if i),
        ]
        assert prompt.listed[:2] == [None, {"600": {"logprob": -1.0, "rank": 1, "decoded_token": names[1]}}]


@pytest.mark.parametrize("sick", [1, 2])
async def test_a_prompt_that_cannot_be_told_is_an_error(sick: int) -> None:
    """Logits that are not finite, and a sibling that fails while others wait."""
    engine = HandFedEngine()
    with work_of(engine) as work:
        pieces = aiter(work.pieces())
        if sick == 1:
            engine.step((2, 800), (1, 800), prompt_logprobs={1: told(1, -1.0, float("nan"), -1.0)})
        else:
            engine.step((2, 800), prompt_logprobs={1: told(1, -1.0)}, finished={2: "error"})
        with pytest.raises(ApiError, match="not finite") as caught:
            while True:
                await anext(pieces)
        assert caught.value.status_code == 500


async def test_a_deadline_before_all_prompts_are_told() -> None:
    engine = HandFedEngine()
    with work_of(engine, num_prompts=2, num_samples=1) as work:
        pieces = aiter(work.pieces())
        engine.step((1, 800), prompt_logprobs={1: told(1, -1.0, -2.0, -3.0), 2: told(1, -1.0)})
        assert texts(await anext(pieces)) == {0: tokenizer().decode([800])}
        work.expire()
        with pytest.raises(ApiError) as caught:
            await anext(pieces)
        assert caught.value.status_code == 504


def test_offsets_count_what_is_shown() -> None:
    bos = tokenizer().bos_token_id
    assert bos is not None
    name = token_text(tokenizer(), bos)
    ids = tokenizer().encode("Hello there, caf\u00e9", add_bos=False)
    pieces = [tokenizer().decode([token]) for token in ids]
    starts = [sum(len(piece) for piece in pieces[:i]) for i in range(len(ids))]
    assert text_offsets(tokenizer(), ids, "Hello there, caf\u00e9")[:3] == starts[:3]
    assert text_offsets(tokenizer(), [bos, *ids], "Hello there, caf\u00e9")[:3] == [0, *starts[:2]]
    assert text_offsets(tokenizer(), [bos, *ids], name + "Hello")[:2] == [0, len(name)]
