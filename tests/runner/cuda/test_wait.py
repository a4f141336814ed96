"""What the host does while the device waits: from the tokens of a step with drafts to the launch of the next one.
Counted, not timed, so that it cannot grow unnoticed."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from gptq_api.engine.core import Engine
from gptq_api.runner.cuda.costs import draft_costs
from gptq_api.runner.cuda.forward import MAX_DRAFT_ROWS, CudaLlama
from gptq_api.runner.cuda.graphs import Graphs
from gptq_api.runner.cuda.runner import CudaRunner
from gptq_api.runner.inputs import StepShape
from gptq_api.scheduler.blocks import BlockManager
from gptq_api.scheduler.drafts import LONGEST_MATCH, Guess
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.scheduler.sequence import Sequence
from gptq_api.scheduler.speculation import Speculation
from gptq_api.types import Add, SamplingParams, StepOutput, pack_ids, unpack_ids
from tests.runner.cuda.test_host import BASE, BLOCK, BUDGET, NUM_SEQS, runners
from tests.support import cuda_stand_ins
from tests.support.checkpoints import random_model, write_checkpoint
from tests.support.drafting import generate, nothing

MOST_CALLS = 360
"""Python's and C's, for eight rows of one sequence; 300 with Python 3.11"""


class Zeros:
    """Right, on a device whose logits are all zero."""

    def guess(self, seq: Sequence, most: int) -> Guess | None:
        return Guess([0] * most, LONGEST_MATCH, "zeros")

    def ended(self, seq: Sequence) -> None:
        pass


class Operations(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class Waits:
    """Looks at what happens between the moment when tokens are there and the launch of the next step."""

    def __init__(self, runner: CudaRunner, monkeypatch: pytest.MonkeyPatch) -> None:
        self.torch_calls: list[list[str]] = []
        self.calls: list[int] = []
        self.told = 0
        """steps whose output was made while the device had nothing to do"""
        self._operations: Operations | None = None
        self._counted = Counter[str]()
        logits, collect = torch.zeros(MAX_DRAFT_ROWS, runner.vocab_size), runner.collect

        def replay(graphs: Graphs, shape: StepShape, capture: bool = True) -> torch.Tensor:
            self._end()
            return logits[: shape.num_sequences]

        def collected(launched: Any) -> Any:
            self._begin()
            return collect(launched)

        monkeypatch.setattr(Graphs, "run", replay)
        monkeypatch.setattr(runner, "collect", collected)
        made = Engine._output

        def output(*args: Any) -> StepOutput:
            self.told += self._operations is not None
            return made(*args)

        monkeypatch.setattr(Engine, "_output", output)

    def _begin(self) -> None:
        self._counted.clear()
        self._operations = Operations()
        self._operations.__enter__()
        sys.setprofile(self._profile)

    def _end(self) -> None:
        sys.setprofile(None)
        if self._operations is not None:
            self._operations.__exit__(None, None, None)
            self.torch_calls.append(self._operations.names)
            self.calls.append(self._counted.total())
            self._operations = None

    def _profile(self, frame: FrameType, event: str, arg: object) -> None:
        self._counted[event] += event in ("call", "c_call")


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CudaRunner:
    cuda_stand_ins.install(monkeypatch)
    monkeypatch.setattr(CudaLlama, "max_draft_rows", MAX_DRAFT_ROWS)
    return runners(write_checkpoint(tmp_path, random_model(replace(BASE, max_position_embeddings=512))), 100)[1]


def test_the_device_waits_for_one_copy_and_few_calls(runner: CudaRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits(runner, monkeypatch)
    speculation = Speculation(Zeros(), MAX_DRAFT_ROWS, 1e-6)
    scheduler = Scheduler(BlockManager(100, BLOCK), NUM_SEQS, BUDGET, speculation=speculation)
    engine: Engine[Any] = Engine(runner, scheduler)
    engine.add(Add(0, pack_ids([5] * 20), (SamplingParams(max_tokens=400, temperature=0.0),)))
    tokens = list[int]()
    while engine.has_work():
        output = engine.step()
        waits._end()
        tokens += [] if output is None else unpack_ids(output.tokens)
    assert tokens == [0] * 400
    steady = slice(5, -3)
    assert len(waits.calls) > 40
    assert {tuple(names) for names in waits.torch_calls[steady]} == {("copy_",)}, "more than the step's inputs go"
    assert max(waits.calls[steady]) <= MOST_CALLS
    assert waits.told <= 1, "what a step brought is told before the next one runs"


def test_costs_are_measured_and_leave_no_trace(runner: CudaRunner) -> None:
    params = [SamplingParams(max_tokens=20, temperature=0)] * 3
    prompts = [[3 + i, 50, 20 - i] * (1 + i) for i in range(3)]
    plain = generate(runner, prompts, params, nothing)
    row_cost, wait_cost = draft_costs(runner)
    assert row_cost >= 0 and wait_cost > 0
    assert [text.output for text in generate(runner, prompts, params, nothing)] == [text.output for text in plain]


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_costs_of_the_smallest_cache(num_blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    monkeypatch.setattr(CudaLlama, "max_draft_rows", MAX_DRAFT_ROWS)
    _, runner = runners(write_checkpoint(tmp_path, random_model(replace(BASE, max_position_embeddings=16))), num_blocks)
    row_cost, wait_cost = draft_costs(runner)
    assert row_cost >= 0 and wait_cost > 0
