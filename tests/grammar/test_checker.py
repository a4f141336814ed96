"""The child process that tries grammars out: it may hang or die, and the next question is answered."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator

import pytest

from gptq_api.grammar import checker as checker_module
from gptq_api.grammar import compile as grammars
from gptq_api.grammar.checker import GrammarChecker


@pytest.fixture
async def checker() -> AsyncIterator[GrammarChecker]:
    made = GrammarChecker(["<|call|>"])
    yield made
    process = made._process
    made.close()
    if process is not None:
        await process.wait()


def pid_of(checker: GrammarChecker) -> int:
    assert checker._process is not None
    return checker._process.pid


async def test_answers(checker: GrammarChecker) -> None:
    assert await checker.check(grammars.json_object()) == ""
    assert await checker.check(grammars.lark("start: <|call|>")) == ""
    assert "unknown special token" in await checker.check(grammars.lark("start: <|other|>"))
    assert "uniqueItems" in await checker.check(grammars.json_schema({"uniqueItems": True}))


async def test_a_child_that_hangs_costs_one_request(checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await checker.check(grammars.regex("a")) == ""
    first = pid_of(checker)
    os.kill(first, signal.SIGSTOP)
    monkeypatch.setattr(checker_module, "SILENCE_S", 0.1)
    assert "nobody" in await checker.check(grammars.regex("b"))
    monkeypatch.setattr(checker_module, "SILENCE_S", 30.0)
    assert await checker.check(grammars.regex("c")) == ""
    assert pid_of(checker) != first


async def test_a_grammar_that_takes_too_long_costs_one_request(checker: GrammarChecker) -> None:
    slow = grammars.json_schema({"properties": {f"k{i}": {"type": "string"} for i in range(9_000)}})
    assert await checker.check(slow) == "it takes more than 0.5 s to compile"
    assert await checker.check(grammars.regex("c")) == ""


async def test_how_a_child_ended_is_known_however_late_it_is_reaped(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By asyncio alone, which a busy machine keeps from it."""
    wait = os.waitpid

    def late(pid: int, options: int) -> tuple[int, int]:
        if options == 0:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            time.sleep(0.2)
        return wait(pid, options)

    monkeypatch.setattr(os, "waitpid", late)
    assert await checker.check(grammars.regex("a")) == ""
    os.kill(pid_of(checker), signal.SIGPROF)
    os.waitid(os.P_PID, pid_of(checker), os.WEXITED | os.WNOWAIT)
    assert await checker.check(grammars.regex("b")) == "it takes more than 0.5 s to compile"


async def test_a_child_that_dies_costs_one_request(checker: GrammarChecker) -> None:
    assert await checker.check(grammars.regex("a")) == ""
    os.kill(pid_of(checker), signal.SIGKILL)
    await checker.check(grammars.regex("b"))  # whether it was dead already when it was asked
    assert await checker.check(grammars.regex("c")) == ""


async def test_one_who_leaves_does_not_leave_an_answer_behind(checker: GrammarChecker) -> None:
    assert await checker.check(grammars.regex("a")) == ""
    os.kill(pid_of(checker), signal.SIGSTOP)
    asking = asyncio.ensure_future(checker.check(grammars.json_schema({"not": {}})))
    await asyncio.sleep(0.01)
    asking.cancel()
    assert await checker.check(grammars.regex("b")) == ""


HOSTILE = {
    "alternatives": grammars.json_schema(
        {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {"type": "integer"}}} for j in range(8)]} for i in range(8)]}
    ),
    "a chain of references": grammars.json_schema(
        {
            "$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 10} for i in range(12)} | {"d12": {}},
            "$ref": "#/$defs/d0",
        }
    ),
    "repetitions": grammars.regex("((a{1,1000}b){1,1000}c){1,1000}"),
    "many states": grammars.regex("(.*a.{20}){30}"),
    "keys": grammars.json_schema({"properties": {f"k{i}": {"enum": list(range(20))} for i in range(1500)}}),
}


@pytest.mark.parametrize("grammar", HOSTILE.values(), ids=HOSTILE)
async def test_hostile_grammars_are_answered(checker: GrammarChecker, grammar: str) -> None:
    await checker.check(grammar)  # refused or not, and not by a limit of pytest
    assert await checker.check(grammars.json_object()) == ""
