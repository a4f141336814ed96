"""Grammars in the engine: on the demo model, whoever else is in the batch, and while they are compiled."""

from __future__ import annotations

import json
import queue
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from gptq_api.engine.core import Engine
from gptq_api.grammar import compile as grammars
from gptq_api.grammar.matchers import Compiled, Grammars
from gptq_api.grammar.vocabulary import vocabulary
from gptq_api.runner.load import load_runner
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.options import LoadOptions
from gptq_api.scheduler.blocks import BlockManager
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.text.folder import checkpoint_folder
from gptq_api.text.tokenizer import Tokenizer, load_tokenizer
from gptq_api.types import Add, SamplingParams, pack_ids, unpack_ids
from tests.support.lagging_runner import LaggingRunner

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def runner() -> LoadedRunner:
    return load_runner(LoadOptions(model_path="demo", device="cpu", num_threads=1, num_blocks=48, block_size=16))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(checkpoint_folder("demo"))


class World:
    """An engine with grammars, and what its sequences got."""

    def __init__(
        self,
        runner: Any,
        tokenizer: Tokenizer,
        num_blocks: int = 48,
        post: Callable[[str, Compiled], None] | None = None,
    ) -> None:
        assert tokenizer.eos_token_id is not None
        self.end, self.tokenizer = tokenizer.eos_token_id, tokenizer
        made = Grammars(lambda: vocabulary(tokenizer, runner.vocab_size, [self.end]), runner.vocab_size)
        self.scheduler = Scheduler(BlockManager(num_blocks, runner.block_size), 16, 64)
        self.engine: Engine[Any] = Engine(runner, self.scheduler, grammars=made, post=post)
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, str] = {}

    def add(self, prompt: str, **params: Any) -> int:
        sequence_id = len(self.tokens)
        self.tokens[sequence_id] = []
        full = {"max_tokens": 120, "seed": sequence_id, "stop_token_ids": (self.end,), **params}
        ids = self.tokenizer.encode(prompt, add_bos=True)
        self.engine.add(Add(sequence_id, pack_ids(ids), (SamplingParams(**full),)))
        return sequence_id

    def drain(self) -> None:
        while self.engine.has_work():
            output = self.engine.step()
            if output is None:
                continue
            for i, token in zip(unpack_ids(output.sequence_ids), unpack_ids(output.tokens), strict=True):
                self.tokens[i].append(token)
            self.finished |= output.finished

    def text(self, sequence_id: int) -> str:
        assert self.finished[sequence_id] == "stop" and self.tokens[sequence_id][-1] == self.end
        return self.tokenizer.decode(self.tokens[sequence_id][:-1])


def crowd(world: World, grammar: str) -> list[int]:
    """Constrained and other sequences side by side; the ids of the constrained ones."""
    constrained = []
    for i in range(9):
        if i % 2:
            constrained.append(world.add(f"Number {i}", grammar=grammar, temperature=1.5))
        else:
            world.add(f"Number {i}", temperature=1.0, max_tokens=40, stop_token_ids=())
    world.drain()
    return constrained


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "a step ahead"])
@pytest.mark.parametrize("num_blocks", [48, 12], ids=["roomy", "crowded"])
def test_documents_are_valid_and_nobody_else_notices(
    runner: LoadedRunner, tokenizer: Tokenizer, ahead: bool, num_blocks: int
) -> None:
    make: Any = LaggingRunner if ahead else lambda found: found
    grammar = grammars.json_schema(SCHEMA)
    world, plain, simple = (
        World(make(runner), tokenizer, num_blocks),
        World(runner, tokenizer),
        World(runner, tokenizer),
    )
    constrained = crowd(world, grammar)
    assert (world.scheduler.counters.preemptions > 0) == (num_blocks == 12)
    crowd(simple, grammar)
    crowd(plain, "")
    for i in world.tokens:
        assert world.tokens[i] == simple.tokens[i], "it depends on the order of the steps"
        if i in constrained:
            jsonschema.validate(json.loads(world.text(i)), SCHEMA)
        else:
            assert world.tokens[i] == plain.tokens[i]


def test_min_tokens_holds_until_nothing_else_is_left(runner: LoadedRunner, tokenizer: Tokenizer) -> None:
    world = World(runner, tokenizer)
    free = world.add("Hello", grammar=grammars.regex("[ab]*"), min_tokens=20, max_tokens=60)
    short = world.add("Hello", grammar=grammars.choice(["ab", "cd"]), min_tokens=20)
    world.drain()
    assert len(world.tokens[free]) >= 20
    assert world.text(short) in ("ab", "cd")


def test_a_bias_against_all_that_is_allowed_changes_nothing(runner: LoadedRunner, tokenizer: Tokenizer) -> None:
    world = World(runner, tokenizer)
    bias = dict.fromkeys(tokenizer.encode("ab12"), -100.0)
    one = world.add("Hello", grammar=grammars.regex("a[0-9]{3}b"), logit_bias=bias, repetition_penalty=2.0)
    world.drain()
    assert re.fullmatch("a[0-9]{3}b", world.text(one))


def test_sequences_wait_for_a_grammar_that_is_compiled_elsewhere(runner: LoadedRunner, tokenizer: Tokenizer) -> None:
    done: queue.SimpleQueue[tuple[str, Compiled]] = queue.SimpleQueue()
    world = World(runner, tokenizer, post=lambda *compiled: done.put(compiled))
    grammar = grammars.regex("x{3,5}")
    first, second, gone = (world.add("Hello", grammar=grammar) for _ in range(3))
    plain = world.add("Hello", max_tokens=3, stop_token_ids=())
    assert world.engine.stats().num_waiting == 4
    world.engine.abort(gone)
    world.drain()
    assert len(world.tokens[plain]) == 3 and not world.tokens[first]
    world.engine.compiled(*done.get(timeout=30))
    world.drain()
    assert world.text(first) and world.text(second)
    assert not world.tokens[gone] and gone not in world.finished
    again = world.add("Hello", grammar=grammar)
    world.drain()
    assert world.text(again), "it is compiled once"


def test_a_grammar_that_does_not_compile_ends_its_sequences(runner: LoadedRunner, tokenizer: Tokenizer) -> None:
    world = World(runner, tokenizer)
    wrong = world.add("Hello", grammar=grammars.regex("("))
    world.drain()
    assert world.finished[wrong] == "error" and not world.tokens[wrong]
