"""Which graphs are kept: the class as it is, over a torch.cuda whose graphs are numbers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_api.runner.cuda import graphs
from gptq_api.runner.cuda.graphs import GRAPH_BYTES, Buckets, Graphs
from gptq_api.runner.inputs import StepShape

MIB = 2**20
START = Buckets(8, 512, 4, 128).start_shapes


class Device:
    """What was captured, replayed, and how much memory graphs take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, graph_bytes: int) -> None:
        self.used = 0
        self.steps: Counter[str] = Counter()
        self.fails = False
        device = self

        class Graph:
            def capture_begin(self, pool: object, capture_error_mode: str) -> None:
                device.steps["captured"] += 1
                device.used += graph_bytes

            def capture_end(self) -> None:
                if device.fails:
                    raise RuntimeError("operation not permitted\nwhen stream is capturing")

            def replay(self) -> None:
                device.steps["replayed"] += 1

            def __del__(self) -> None:
                device.used -= graph_bytes

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**10 - self.used, 10**10))

    def body(self, shape: StepShape) -> Tensor:
        self.steps["body"] += 1
        return torch.tensor(shape)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Device]:
    return lambda graph_bytes: Device(monkeypatch, graph_bytes)


def mixed(i: int) -> StepShape:
    return StepShape(16 + i, 8, 128, 4)


def twice(made: Graphs, shape: StepShape) -> None:
    for _ in range(2):
        assert made.run(shape).tolist() == list(shape)


def test_the_second_step_of_a_shape_is_captured_and_later_ones_replayed(device: Any) -> None:
    there = device(MIB)
    made = Graphs(there.body, START)
    for expected in (("body",), ("captured", "body", "replayed"), ("replayed",), ("replayed",)):
        there.steps.clear()
        assert made.run(mixed(0)).tolist() == list(mixed(0))
        assert there.steps == Counter(expected)
    for _ in range(3):
        made.run(mixed(1), capture=False)
    assert len(made) == 1 and made.num_bytes == MIB


def test_what_was_not_used_for_the_longest_time_makes_room_and_begins_anew(device: Any) -> None:
    there = device(4 * MIB)
    made = Graphs(there.body, START)
    for shape in START:
        twice(made, shape)
    room = GRAPH_BYTES // (4 * MIB) - len(START)
    assert str(made) == f"{len(START)} CUDA graphs take {4 * len(START)} MiB; up to {room} more are kept, the last used"
    for i in range(room):
        twice(made, mixed(i))
    made.run(mixed(0))
    for i in range(room, room + 3):
        twice(made, mixed(i))
    assert len(made) == len(START) + room and there.used <= GRAPH_BYTES
    assert made.num_bytes > GRAPH_BYTES, "what was taken, not what is held"
    there.steps.clear()
    for shape in (*START, mixed(0), *map(mixed, range(4, room + 3))):
        made.run(shape)
    assert set(there.steps) == {"replayed"}, "the start's shapes, and those used last"
    for i in (1, 2, 3):
        there.steps.clear()
        made.run(mixed(i))
        assert there.steps == Counter(["body"]), i


@pytest.mark.parametrize(
    ("graph_bytes", "most"), [(0, graphs._MOST), (1000, graphs._MOST), (GRAPH_BYTES, graphs._FEWEST)]
)
def test_however_large_graphs_are_some_are_kept_and_not_all(device: Any, graph_bytes: int, most: int) -> None:
    there = device(graph_bytes)
    made = Graphs(there.body, START)
    for i in range(most + 5):
        twice(made, mixed(i))
    assert len(made) == most


def test_a_shape_that_cannot_be_captured_runs_without_and_is_told_once(
    device: Any, caplog: pytest.LogCaptureFixture
) -> None:
    there = device(MIB)
    made = Graphs(there.body, START)
    there.fails = True
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            twice(made, mixed(0))
    assert len(made) == 0 and there.steps["captured"] == 1 and there.steps["replayed"] == 0
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["operation not permitted"]
    there.fails = False
    twice(made, mixed(1))
    assert len(made) == 1
