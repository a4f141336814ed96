"""What users feel of how steps are put together: the scheduler on a simulated device, in simulated time.

Whoever decodes waits for the prompts beside it, and whoever comes waits for those who decode. This runs the real engine
on simulated_device.py, whose steps take as long as those of LLaMA-13B on an H200, with a clock of its own: minutes of
load in a second, the same figures every time.

    python benchmarks/latency.py            # a table; --rows: with steps limited by their rows, as on the CPU
"""

from __future__ import annotations

import argparse
import math
import random
from collections import deque
from dataclasses import dataclass, field

from simulated_device import SimulatedRunner

from gptq_api.engine.core import Engine
from gptq_api.scheduler.blocks import BlockManager
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.step import PromptCosts
from gptq_api.types import Add, SamplingParams, pack_ids, unpack_ids

BUDGET = 2048


class Clock:
    """Seconds, which pass when somebody sleeps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@dataclass
class Felt:
    """Of one load, in milliseconds."""

    first: list[float] = field(default_factory=list)
    """to the first token, by request"""
    between: dict[int, list[float]] = field(default_factory=dict)
    """by request: between two tokens"""
    tokens_per_second: float = 0.0

    def between_p99(self, requests: range | None = None) -> float:
        return p99([gap for i, gaps in self.between.items() if requests is None or i in requests for gap in gaps])


def p99(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def load(
    requests: list[tuple[int, int]], users: int, *, by_rows: bool = False, said: PromptCosts | None = None
) -> Felt:
    """`requests`: (tokens of the prompt, of the answer). Each user sends the next one when its last has ended; so many
    users as requests are a burst. `by_rows`: without what the device says that prompts cost; `said`: what it says,
    which may be wrong."""
    clock = Clock()
    runner = SimulatedRunner(clock.now, clock.sleep)
    costs = None if by_rows else said or runner.prompt_costs
    blocks = BlockManager(runner.num_blocks, runner.block_size)
    scheduler = Scheduler(blocks, 256, BUDGET, False, runner.row_multiple, prompt_costs=costs)
    engine = Engine(runner, scheduler, clock=clock.now)
    felt, began, last = Felt(), dict[int, float](), dict[int, float]()
    todo = deque(enumerate(requests))
    firsts = dict[int, float]()

    def send() -> None:
        i, (prompt, new) = todo.popleft()
        began[i] = clock.seconds
        engine.add(Add(i, pack_ids([100] * prompt), (SamplingParams(max_tokens=new, temperature=0.0),)))

    for _ in range(min(users, len(todo))):
        send()
    num_tokens = 0
    while engine.has_work():
        output = engine.step()
        if output is None:
            continue
        for i in unpack_ids(output.sequence_ids):
            num_tokens += 1
            if i in last:
                felt.between.setdefault(i, []).append(1e3 * (clock.seconds - last[i]))
            else:
                firsts[i] = 1e3 * (clock.seconds - began[i])
            last[i] = clock.seconds
        for _ in output.finished:
            if todo:
                send()
    felt.first = [firsts[i] for i in sorted(firsts)]
    felt.tokens_per_second = num_tokens / clock.seconds
    return felt


def sampled_lengths(num: int, seed: int = 0) -> list[tuple[int, int]]:
    """Long and short ones, about 310 tokens in and 150 out on average."""
    rng = random.Random(seed)

    def length(mean: float, spread: float, most: int) -> int:
        return min(most, max(4, int(rng.lognormvariate(mean, spread))))

    return [(length(5.3, 1, 2000), length(4.7, 0.8, 800)) for _ in range(num)]


LOADS: dict[str, tuple[list[tuple[int, int]], int]] = {
    "64 users, 128 tokens in and out": ([(128, 128)] * 256, 64),
    "256 users, the same": ([(128, 128)] * 768, 256),
    "256 at once, the same": ([(128, 128)] * 256, 256),
    "256 at once, sampled lengths": (sampled_lengths(256), 256),
    "4 that decode beside a prompt of 30,000 tokens": ([(128, 600)] * 4 + [(30_000, 8)], 5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", action="store_true", help="steps are limited by their rows")
    by_rows = parser.parse_args().rows
    print(f"{'':48} tok/s   first token p99   between tokens p99, ms")
    for name, (requests, users) in LOADS.items():
        felt = load(requests, users, by_rows=by_rows)
        print(f"{name:48} {felt.tokens_per_second:5.0f} {p99(felt.first):17.0f} {felt.between_p99():24.1f}")


if __name__ == "__main__":
    main()
