"""What drafts bring and cost where a text is written down beforehand and time is counted in steps of one row: copies
gain much, prose does not lose."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from gptq_api.scheduler.drafts import PastAnswers, TextDrafts
from gptq_api.scheduler.sequence import Sequence
from gptq_api.scheduler.speculation import Speculation
from gptq_api.types import SamplingParams

ROOT = Path(__file__).parents[2]
DEVICES = {
    "a GPU": (0.02, 0.1),
    "a GPU, small model": (0.02, 0.5),
    "a CPU": (0.12, 0.0),
    "a CPU, small model": (0.42, 0.0),
}
"""what a row costs, and what waiting does; without that a step is always collected first"""


class Clock:
    """A sequence that gets a known text, step by step."""

    def __init__(
        self, prompt: list[int], row_cost: float, wait_cost: float, prediction: list[int] | None = None
    ) -> None:
        self._row_cost, self._wait_cost = row_cost, wait_cost
        self._speculation = Speculation(TextDrafts(PastAnswers()), 8, row_cost, wait_cost)
        self._seq = Sequence(1, list(prompt), SamplingParams(max_tokens=10**6))
        self._seq.prediction = prediction or []
        self.time = 0.0

    def read(self, answer: list[int]) -> float:
        """How many times as fast as a token a step."""
        place = 0
        while place < len(answer):
            if self._wait_cost:  # a step ahead, until it pays to wait
                self._seq.num_tokens_in_flight = 1
                waits = self._speculation.had_better_wait([self._seq])
                self._seq.num_tokens_in_flight = 0
                place += self._step(answer[place:], [])
                if not waits:
                    continue
                self.time += self._wait_cost
            while place < len(answer):
                drafts = self._speculation.drafts([self._seq], 100).get(self._seq, [])
                if self._wait_cost and not drafts:
                    break
                place += self._step(answer[place:], drafts)
                self.time += self._wait_cost
        return len(answer) / self.time

    def _step(self, coming: list[int], drafts: list[int]) -> int:
        """How many tokens it brought."""
        num = 1
        while num <= len(drafts) and num < len(coming) and drafts[num - 1] == coming[num - 1]:
            num += 1
        before = len(self._seq.token_ids)
        for token in coming[:num]:
            self._seq.append(token)
        self._speculation.learn(self._seq, before, len(drafts), num - 1)
        self.time += 1 + self._row_cost * len(drafts)
        return num


def tokens(text: str) -> list[int]:
    """Words and what stands between them."""
    known: dict[str, int] = {}
    return [known.setdefault(word, len(known)) for word in re.findall(r" ?\w+|\s+|[^\w\s]", text)]


@pytest.mark.parametrize("device", DEVICES)
def test_text_that_is_written_once_loses_nothing(device: str) -> None:
    """Prose and code of this repository, and numbers by chance out of few and of many."""
    rng = random.Random(1)
    texts = [tokens((ROOT / name).read_text()) for name in ("docs/architecture.md", "gptq_api/scheduler/scheduler.py")]
    texts += [[rng.randrange(num) for _ in range(1500)] for num in (50, 1000, 30_000)]
    for text in texts:
        assert Clock(text[:500], *DEVICES[device]).read(text[500:2000]) > 0.99


@pytest.mark.parametrize("predicted", [False, True], ids=["copied", "predicted"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_with_a_fifth_changed_gains(device: str, predicted: bool) -> None:
    rng = random.Random(2)
    text = tokens((ROOT / "gptq_api/scheduler/scheduler.py").read_text())[:1500]
    edited, place = list[int](), 0
    while place < len(text):
        same, other = rng.randrange(20, 60), rng.randrange(4, 14)
        edited += text[place : place + same]
        place += same + other
        edited += [rng.randrange(10**5, 10**6) for _ in range(other)]
    clock = Clock([1, 2, 3], *DEVICES[device], text) if predicted else Clock(text, *DEVICES[device])
    assert clock.read(edited) > {"a CPU, small model": 1.4, "a GPU, small model": 1.8}.get(device, 2.1)
