"""The CPU's runner behind a device's door: one step ahead. What it knows of a sequence is what its admission said and
what it sampled since, so it need not wait for the scheduler to know that too."""

from __future__ import annotations

from collections import deque
from typing import Any

from gptq_api.runner.cpu.runner import Computed, CpuRunner
from gptq_api.step import Masks, Sampled, Step


class LaggingRunner:
    lookahead = 1

    def __init__(self, runner: CpuRunner) -> None:
        self._runner = runner
        self._queue: deque[Computed] = deque()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def launch(self, step: Step) -> Computed:
        launched = self._runner.launch(step)
        self._queue.append(launched)
        return launched

    def draw(self, launched: Computed, masks: Masks) -> None:
        assert self._queue[0] is launched, "drawn before the step before it was collected"
        self._runner.draw(launched, masks)

    def collect(self, launched: Computed) -> Sampled:
        assert self._queue.popleft() is launched
        return self._runner.collect(launched)
