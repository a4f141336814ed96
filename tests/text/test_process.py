"""The process that encodes and renders: hostile templates and tokenizers end one request, or the start, and nothing
else."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gptq_api.frames import WireError
from gptq_api.text.chat import ChatTemplateError
from gptq_api.text.chat_template import load_chat_template
from gptq_api.text.process import BlockingTokenizer, TextError, TextProcess, TextProcessGone
from gptq_api.text.tokenizer import MAX_IDS, TokenizerError, load_tokenizer
from gptq_api.text.wire import decode_answer
from tests.support.text_tokenizers import byte_level, spm

PLAIN = "<|a|>{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
TURNS = [{"role": "user", "content": "Hello!"}]
# one template that holds them all: which of them goes off is what the user says
BOMBS = {
    "repetition": "{{ 'a' * 10**10 }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": "{% set n = namespace(x='a'*99) %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "exponential recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "padding": "{{ 'a'.ljust(10**10) }}",
    "power": "{{ 2 ** 64 ** 64 ** 64 }}",
    "rounding": "{{ 1 | round(10**9, 'ceil') }}",
    "comparing": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "much text": "{% for i in range(3000) %}" + "x" * 1000 + "{% endfor %}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__()[0] }}",
    "mutation": "{{ messages.append(1) }}",
}
LOADED = (
    PLAIN
    + "{% set which = messages[-1].content %}"
    + "".join(
        f"{{% if which == {name!r} %}}{{% if true %}}{bomb}{{% endif %}}{{% endif %}}" for name, bomb in BOMBS.items()
    )
)


def set_template(folder: Path, jinja: str) -> Path:
    (folder / "chat_template.jinja").write_text(jinja)
    return folder


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[TextProcess]:
    process = TextProcess(folder)
    await process.start()
    try:
        yield process
    finally:
        process.close()


def children(process: TextProcess) -> list[int]:
    """Of the server's child: the worker."""
    connection = process._connection
    assert connection is not None
    pid = connection.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def eventually(what: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        await asyncio.sleep(0.02)


def run(test: Awaitable[None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(120):
            await test

    asyncio.run(main())


def test_it_answers_as_the_tokenizer_and_the_template_do(tmp_path: Path) -> None:
    folder = set_template(byte_level(tmp_path), PLAIN)
    tokenizer = load_tokenizer(folder)
    template = load_chat_template(folder, tokenizer)

    async def test() -> None:
        process = TextProcess(folder)
        tokens, facts = await process.start()
        assert facts == template.facts
        assert tokens.table == tokenizer.table
        messages = [{"role": "user", "content": "hé </s> <|a|> 🎉"}, {"role": "assistant", "content": "On"}]
        assert await process.render(messages) == template.render(messages)
        options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
        assert await process.render(messages, **options) == template.render(messages, **options)
        assert await process.render_text(messages) == template.render_text(messages)
        texts = ["", "a b", "x" * 5000, "<|a|>"]
        for special in (False, True):
            expected = [tokenizer.encode(text, add_bos=True, parse_special=special) for text in texts]
            assert await process.encode(texts, add_bos=True, parse_special=special) == expected
        huge: dict[str, Any] = {"schema": {"maximum": 10**40}}
        assert await process.render_text(messages, variables=huge) == template.render_text(messages)
        answers = await asyncio.gather(*(process.encode([f"number {i}"]) for i in range(50)))
        assert [tokens.decode(ids) for (ids,) in answers] == [f"number {i}" for i in range(50)]
        process.close()
        blocking = BlockingTokenizer(folder)
        assert blocking.encode("a b") == tokenizer.encode("a b")
        assert blocking.table == tokenizer.table
        blocking.close()

    run(test())


def test_what_a_template_costs_too_much_is_one_request_s_error(tmp_path: Path) -> None:
    folder = set_template(byte_level(tmp_path), LOADED)

    async def test() -> None:
        async with running(folder) as process:
            expected = await process.render(TURNS)
            for name in BOMBS:
                bomb = [{"role": "user", "content": name}]
                with pytest.raises((ChatTemplateError, TextError)) as caught:
                    await process.render(bomb)
                assert "\n" not in str(caught.value)
                assert await process.render(TURNS) == expected, name

    run(test())


@pytest.mark.alone
def test_a_bomb_takes_nobody_with_it_and_no_server_s_memory(tmp_path: Path) -> None:
    folder = set_template(byte_level(tmp_path), LOADED)

    async def test() -> None:
        async with running(folder) as process:
            expected = await process.render(TURNS)
            bomb = [{"role": "user", "content": "nested loops"}]
            asked = [process.render(bomb if i == 3 else TURNS) for i in range(8)]
            lags: list[float] = []

            async def look() -> None:
                while True:
                    before = time.monotonic()
                    await asyncio.sleep(0.01)
                    lags.append(time.monotonic() - before)

            looking = asyncio.ensure_future(look())
            answers = await asyncio.gather(*asked, return_exceptions=True)
            looking.cancel()
            assert isinstance(answers[3], TextError)
            assert "takes too long" in str(answers[3])
            assert [answer for i, answer in enumerate(answers) if i != 3] == [expected] * 7
            assert sorted(lags)[len(lags) // 2] < 0.1  # the event loop went on

    run(test())


@pytest.mark.parametrize("stage", ["at load", "at the first request"])
def test_a_template_that_cannot_be_used_is_a_sentence_at_start(stage: str, tmp_path: Path) -> None:
    jinja = {
        "at load": "{% for a in b %}" * 30 + "{% endfor %}" * 30,  # Python has a limit of its own for loops in loops
        "at the first request": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    }[stage]
    folder = set_template(byte_level(tmp_path), jinja)
    with pytest.raises((TokenizerError, ChatTemplateError), match="chat template") as caught:
        run(start(folder))
    assert "\n" not in str(caught.value)


async def start(folder: Path) -> None:
    await TextProcess(folder).start()


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_what_a_tokenizer_costs_too_much_is_one_request_s_error(tmp_path: Path) -> None:
    growing = [{"type": "Replace", "pattern": {"String": "z"}, "content": "zz"} for _ in range(40)]
    folder = edited(set_template(byte_level(tmp_path), PLAIN), normalizer={"type": "Sequence", "normalizers": growing})

    async def test() -> None:
        async with running(folder) as process:
            expected = await process.encode(["fine"])
            for _ in range(2):
                with pytest.raises(TextError):
                    await process.encode(["fuzz"])
                assert await process.encode(["fine"]) == expected

    run(test())


def test_a_regex_that_backtracks_is_ended(tmp_path: Path) -> None:
    evil = {"type": "Split", "pattern": {"Regex": r"(?:x|x|x)+$"}, "behavior": "Isolated", "invert": False}
    folder = edited(set_template(byte_level(tmp_path), PLAIN), pre_tokenizer=evil)

    async def test() -> None:
        async with running(folder) as process:
            with pytest.raises(TextError):
                await process.encode(["x" * 60 + "!"])
            assert await process.encode(["x"])

    run(test())


@pytest.mark.parametrize("bomb", ["long control token", "absurd id"])
def test_absurd_vocabularies_are_a_sentence_at_start(bomb: str, tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    content = "<|" + "x" * 60_000 + "|>" if bomb == "long control token" else "<|far|>"
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    token = {"id": 300 if bomb == "long control token" else MAX_IDS + 5, "content": content}
    if bomb == "absurd id":
        vocab = json.loads((folder / "tokenizer.json").read_text())["model"]
        vocab["vocab"]["far"] = MAX_IDS + 5
        edited(folder, model=vocab)
    else:
        edited(folder, added_tokens=[*added, {**added[0], **token}])
    with pytest.raises(TokenizerError, match="copy it again"):
        run(start(folder))


def test_a_folder_without_a_tokenizer_is_the_same_sentence_as_ever(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        run(start(tmp_path))
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        BlockingTokenizer(tmp_path)


def test_it_comes_back_after_whatever_ended_it(tmp_path: Path) -> None:
    folder = set_template(spm(tmp_path), "{{ messages[0].content }}")

    async def test() -> None:
        async with running(folder) as process:
            expected = await process.encode(["a b"])
            (worker,) = children(process)
            os.kill(worker, signal.SIGKILL)  # while it has nothing to do: nobody is told
            assert await process.encode(["a b"]) == expected
            assert await process.encode(["c"]) != expected
            connection = process._connection
            assert connection is not None
            os.kill(connection.process.pid, signal.SIGKILL)
            await eventually(lambda: process._connection is None)
            assert await process.encode(["a b"]) == expected
            (folder / "tokenizer.model").unlink()
            connection = process._connection
            assert connection is not None
            os.kill(connection.process.pid, signal.SIGKILL)
            await eventually(lambda: process._connection is None)
            with pytest.raises(TextProcessGone, match="cannot be started again"):
                await process.encode(["a b"])

    run(test())


def test_it_opens_nothing_and_leaves_with_the_server(tmp_path: Path) -> None:
    folder = set_template(byte_level(tmp_path), PLAIN)

    async def test() -> None:
        async with running(folder) as process:
            await process.encode(["a b"])
            (worker,) = children(process)
            limits = Path(f"/proc/{worker}/limits").read_text().splitlines()
            for name in ("Max open files", "Max file size", "Max core file size"):
                assert next(line for line in limits if line.startswith(name)).split()[-3] in ("0",)
            connection = process._connection
            assert connection is not None
        await eventually(lambda: not Path(f"/proc/{worker}").exists())
        assert not Path(f"/proc/{connection.process.pid}").exists()

    run(test())


@pytest.mark.parametrize("payload", [b"", b"1234567", bytes(8), bytes(8) + b"\xff", bytes(8) + b"\x81\xa4type\xa1\xff"])
def test_what_is_no_answer_is_a_wire_error(payload: bytes) -> None:
    with pytest.raises(WireError):
        decode_answer(payload)
