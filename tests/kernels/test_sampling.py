"""The sampler on the GPU against the one on the CPU, which test_sampler.py checks against the distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor

from gptq_api.kernels import gemm, sampling
from gptq_api.runner.cpu.sampler import sample as sample_on_cpu
from gptq_api.runner.seats import Seat
from gptq_api.types import SamplingParams, TokenLogprobs

_reason = gemm.unavailable_reason()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_reason is not None, reason=_reason or "")]

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1e-6, "top_p": 0.9},
    {"top_p": 0.5},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_p": 0.9999999, "temperature": 2.0},
    {"top_p": 1e-9},
    {"top_k": 1},
    {"top_k": 40, "temperature": 1.5},
    {"top_k": 5000, "temperature": 2.0},
    {"top_k": 10**6},
    {"top_k": 50, "top_p": 0.8},
    {"min_p": 0.05},
    {"min_p": 0.02, "top_k": 400, "top_p": 0.95},
    {"min_p": 1.0},
]
PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.5, "frequency_penalty": -0.4},
    {"logit_bias": {3: 5.0, 0: -100.0, 5: 100.0}, "repetition_penalty": 0.5},
    {"min_tokens": 9, "stop_token_ids": (1, 2, 5), "logit_bias": {1: 50.0, 5: 8.0}},
    {"frequency_penalty": 2.0, "temperature": 0.0},
]


def sequences(num: int, size: int, kinds: list[dict[str, Any]], seed: int = 0) -> list[Seat]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(num):
        prompt = torch.randint(min(size, 50), (1 + i % 40,), generator=generator).tolist()
        output = torch.randint(min(size, 20), (i % 23,), generator=generator).tolist()
        params = SamplingParams(max_tokens=100, **{"seed": 1 - i * i, **kinds[i % len(kinds)]})
        made.append(Seat(prompt + output, len(prompt), params))
    return made


def rows(num: int, size: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(num, size, generator=torch.Generator().manual_seed(seed)) * scale


class Step:
    """What the runner holds for one step."""

    def __init__(self, logits: Tensor, batch: list[Seat], capacity: int = 80) -> None:
        self.logits, self.batch = logits.cuda(), batch
        self.table = sampling.SamplingTable(len(batch))
        self.history = torch.full((len(batch), capacity), -7, dtype=torch.int32)
        self.seats = list(range(len(batch) - 1, -1, -1))  # not the order of the rows
        for seat, s in zip(self.seats, batch, strict=True):
            self.table.set(seat, s.params, s.num_prompt_tokens)
            self.history[seat, : len(s.token_ids)] = torch.tensor(s.token_ids, dtype=torch.int32)
        self.history = self.history.cuda()
        self.lengths = [len(s.token_ids) for s in batch]
        self.staging = torch.empty(sampling.FIELDS, len(batch) + 3, dtype=torch.int32, pin_memory=True)
        self.needs = self.table.fill(self.staging.numpy()[:, : len(batch)], self.seats, self.lengths)
        self.inputs = sampling.SamplingInputs(self.staging.cuda()[:, : len(batch)])
        self.tokens = torch.full((len(batch),), -9, dtype=torch.int32, device="cuda")
        self.logprobs = torch.zeros(len(batch), 2, 21, dtype=torch.int32, device="cuda")

    def run(self, masks: dict[int, NDArray[np.int32]] | None = None) -> tuple[list[int], list[TokenLogprobs | None]]:
        adjusted = self.logits
        if self.needs.adjust or masks:
            entries = self.table.entries(self.seats, self.lengths).cuda()
            adjusted = torch.empty_like(self.logits) if self.needs.logprobs else self.logits
            packed = None
            if masks:
                packed = sampling.packed_masks(len(self.batch), list(masks), np.stack(list(masks.values()))).cuda()
            sampling.adjust(self.logits, self.inputs, self.history, entries, adjusted, packed)
        sampling.sample(adjusted, self.inputs, self.history, self.tokens)
        logprobs: list[TokenLogprobs | None] = [None] * len(self.batch)
        if self.needs.logprobs:
            sampling.logprobs(self.logits, self.inputs, self.tokens, self.logprobs)
            host = self.logprobs.cpu()
            for i, s in enumerate(self.batch):
                if s.params.top_logprobs is not None:
                    logprobs[i] = sampling.read_logprobs(host[i], s.params.top_logprobs)
        return self.tokens.tolist(), logprobs


def agree(logits: Tensor, batch: list[Seat], tolerated: int = 0) -> None:
    expected = sample_on_cpu(logits.clone(), batch)[0]
    found = Step(logits, batch).run()[0]
    for num in (1, 10, 20, 40):  # the fewer rows, the more blocks each gets
        assert Step(logits[:num], batch[:num]).run()[0] == found[:num]
    wrong = [(i, batch[i].params, f, e) for i, (f, e) in enumerate(zip(found, expected, strict=True)) if f != e]
    assert len(wrong) <= tolerated, wrong


@pytest.mark.parametrize("size", [31, 700, 4097, 32000, 128256])
@pytest.mark.parametrize("kinds", [KINDS, KINDS + PENALTIES, [{**kind, "top_logprobs": 2} for kind in KINDS]])
def test_masks_leave_what_the_cpu_leaves(size: int, kinds: list[dict[str, Any]]) -> None:
    rng = np.random.default_rng(size)
    batch = sequences(40, size, kinds)
    masks = {}
    for row in range(0, 40, 3):
        batch[row] = Seat(
            batch[row].token_ids,
            batch[row].num_prompt_tokens,
            replace(batch[row].params, grammar="one", min_tokens=0),
        )
        bits = rng.random(size) < rng.choice([0.001, 0.5, 0.999])
        bits[rng.integers(size)] = True
        words = np.zeros(-(-size // 32) * 4, np.uint8)
        packed = np.packbits(bits, bitorder="little")
        words[: len(packed)] = packed
        masks[row] = words.view(np.int32)
    logits = rows(40, size)
    expected = sample_on_cpu(logits.clone(), batch, masks)[0]
    found = Step(logits, batch).run(masks)[0]
    assert sum(f != e for f, e in zip(found, expected, strict=True)) <= 1, (found, expected)
    for row, mask in masks.items():
        assert mask.view(np.uint8)[found[row] // 8] >> found[row] % 8 & 1


@pytest.mark.parametrize("size", [1, 6, 129, 700, 2048, 32000, 32001, 128256])
def test_the_tokens_of_the_cpu(size: int) -> None:
    """Up to the rounding of logarithms where the first two of a race are as close: about one token in a hundred
    thousand."""
    num = 300 if size < 40000 else 60
    agree(rows(num, size), sequences(num, size, KINDS), tolerated=1)
    agree(rows(num, size, 1, 0.02), sequences(num, size, KINDS, 1), tolerated=1)  # nearly flat: full bins


@pytest.mark.parametrize("size", [700, 5000, 32000])
def test_equal_logits(size: int) -> None:
    flat = torch.zeros(60, size)
    agree(flat, sequences(60, size, KINDS))
    agree(torch.where(torch.arange(size) % 3 == 0, -flat, flat), sequences(60, size, KINDS, 2))  # 0 and -0
    agree((rows(60, size) > 0).float(), sequences(60, size, KINDS, 3), tolerated=1)
    agree((rows(60, size) * 2).round(), sequences(60, size, KINDS, 4), tolerated=1)


@pytest.mark.parametrize("size", [6, 700, 5000, 32001])
def test_penalties_and_bias(size: int) -> None:
    kinds = [{**penalty, **kind} for kind in KINDS for penalty in [*PENALTIES, {}]]
    agree(rows(len(kinds), size), sequences(len(kinds), size, kinds), tolerated=1)


def test_logprobs_are_of_the_raw_logits() -> None:
    counts = [None, 0, 1, 5, 20]
    kinds = [{**KINDS[i % 5], **(PENALTIES[i % 3] if i % 2 else {}), "top_logprobs": counts[i % 5]} for i in range(30)]
    for size in (6, 5000, 32000):
        logits = rows(30, size)
        logits[7] = logits[7].round()
        logits[8, 2] += 60.0
        batch = sequences(30, size, kinds)
        tokens, expected = sample_on_cpu(logits.clone(), batch)
        found_tokens, found = Step(logits, batch).run()
        assert found_tokens == tokens
        for f, e in zip(found, expected, strict=True):
            assert (f is None) == (e is None)
            if f is None or e is None:
                continue
            assert f.logprob == pytest.approx(e.logprob, abs=2e-5)
            assert [v for _, v in f.top] == pytest.approx([v for _, v in e.top], abs=2e-5)
            assert len({t for t, _ in f.top}) == len(f.top)
    assert [t for t, _ in found[4].top] == [t for t, _ in expected[4].top]  # type: ignore[union-attr]


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_gives_minus_one_and_spares_the_others(bad: float) -> None:
    kinds = [{**kind, **penalty, "top_logprobs": 2} for kind in KINDS for penalty in [{}, PENALTIES[3]]]
    for size in (6, 5000, 32001):
        logits = rows(len(kinds), size)
        logits[::3, size - 1] = bad
        logits[1::3, 1] = bad  # a forbidden stop token
        batch = sequences(len(kinds), size, kinds)
        step = Step(logits, batch)
        tokens, logprobs = step.run()
        assert tokens == sample_on_cpu(logits.clone(), batch)[0]
        assert tokens[::3] == [-1] * len(tokens[::3]) and min(tokens[2::3]) >= 0
        assert logprobs[0] is None and logprobs[2] is not None
        assert step.history[step.seats[0], len(batch[0].token_ids)] == 0


def test_history_grows_by_the_token_and_padding_is_left_alone() -> None:
    batch = sequences(40, 5000, KINDS)
    step = Step(rows(40, 5000), batch)
    step.inputs.packed[0, 5::7] = -1
    before = step.history.clone()
    tokens = step.run()[0]
    for i, s in enumerate(batch):
        assert (tokens[i] == -1) == (i % 7 == 5)
        if i % 7 != 5:
            before[step.seats[i], len(s.token_ids)] = tokens[i]
    assert torch.equal(step.history, before)
    Step(rows(1, 50), [batch[9]], capacity=len(batch[9].token_ids)).run()  # nothing is written behind the end


def test_a_row_does_not_depend_on_the_others_and_graphs_replay() -> None:
    kinds = [{**kind, **penalty} for kind in KINDS for penalty in [*PENALTIES, {}]]
    logits, batch = rows(len(kinds), 32000), sequences(len(kinds), 32000, kinds)
    whole = Step(logits, batch).run()[0]
    for i in range(0, len(kinds), 7):
        assert Step(logits[i : i + 1], [batch[i]]).run()[0] == [whole[i]]
    step = Step(logits, batch)
    entries, adjusted = step.table.entries(step.seats, step.lengths).cuda(), torch.empty_like(step.logits)
    step.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampling.adjust(step.logits, step.inputs, step.history, entries, adjusted)
        sampling.sample(adjusted, step.inputs, step.history, step.tokens)
    step.logits.copy_(logits)
    for _ in range(50):
        step.tokens.fill_(-9)
        graph.replay()
        assert step.tokens.tolist() == whole


@pytest.mark.parametrize("scale", [0.1, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.8}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.05}])
def test_noise_of_rounding_size_changes_hardly_any_draw(scale: float, params: dict[str, Any]) -> None:
    """As on the CPU (test_sampler.py)."""
    logits, noise = rows(1, 32000, scale=scale).repeat(200, 1), rows(200, 32000, 6, 1e-3)
    batch = sequences(200, 32000, [params])
    for i, s in enumerate(batch):
        s.params = replace(s.params, seed=i)
    drawn, moved = Step(logits, batch).run()[0], Step(logits + noise, batch).run()[0]
    changed = sum(a != b for a, b in zip(drawn, moved, strict=True))
    assert len(set(drawn)) > 5
    assert changed <= (10 if scale < 1 and "top_k" in params else 2)


def test_wrong_shapes_are_named() -> None:
    step = Step(rows(4, 100), sequences(4, 100, KINDS))
    with pytest.raises(ValueError, match=r"4 columns on cuda:0 for 3 rows"):
        sampling.sample(step.logits[:3], step.inputs, step.history, step.tokens[:3])
    with pytest.raises(ValueError, match=r"torch.float64"):
        sampling.sample(step.logits.double(), step.inputs, step.history, step.tokens)
    with pytest.raises(ValueError, match=r"top_logprobs 21"):
        step.table.set(0, SamplingParams(max_tokens=1, top_logprobs=21), 1)
