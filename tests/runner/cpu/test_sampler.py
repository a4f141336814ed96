"""The distribution of sampled tokens, and that it is a function of seed, position and logits alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gptq_api.runner.cpu import native, native_sampler
from gptq_api.runner.cpu.sampler import random_bits, random_words, sample
from gptq_api.runner.seats import Seat
from gptq_api.types import SamplingParams


@pytest.fixture(autouse=True, params=["torch", "kernels"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`sample` by either. One thread: two of a busy machine wait for each other at each of hundreds of small
    operations."""
    if request.param == "kernels":
        if not native.is_available():
            pytest.skip(native.MISSING)
        monkeypatch.setitem(globals(), "sample", native_sampler.sample)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ROW = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
WIDE = torch.randn(700, generator=torch.Generator().manual_seed(3)) * 2


def sequence(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> Seat:
    tokens = prompt or [1]
    return Seat([*tokens, *(output or [])], len(tokens), SamplingParams(**{"max_tokens": 100, **params}))


def draws(row: torch.Tensor, num: int = 4000, **params: Any) -> torch.Tensor:
    """Relative frequencies over seeds."""
    tokens: list[int] = []
    for start in range(0, num, 500):
        sequences = [sequence(seed=seed, **params) for seed in range(start, start + 500)]
        tokens += sample(row.repeat(500, 1), sequences)[0]
    return torch.bincount(torch.tensor(tokens), minlength=len(row)) / num


def near(found: torch.Tensor, expected: torch.Tensor, num: int = 4000) -> None:
    deviation = (expected * (1 - expected) / num).sqrt()
    assert (found[expected == 0] == 0).all()
    assert ((found - expected).abs() <= 5 * deviation + 3 / num).all(), (found, expected)


def test_temperature() -> None:
    near(draws(ROW), ROW.softmax(-1))
    near(draws(ROW, temperature=0.5), (ROW / 0.5).softmax(-1))
    near(draws(ROW, temperature=2.0), (ROW / 2).softmax(-1))


def test_temperature_0_and_nearly_0_are_greedy() -> None:
    assert draws(ROW, 500, temperature=0.0)[0] == 1
    assert draws(ROW, 500, temperature=1e-6)[0] == 1
    assert draws(ROW * 1e4, 500, temperature=1e-3, top_p=0.9)[0] == 1


def test_top_k() -> None:
    expected = torch.zeros(6)
    expected[:3] = ROW[:3].softmax(-1)
    near(draws(ROW, top_k=3), expected)
    near(draws(ROW, top_k=100), ROW.softmax(-1))


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    p = ROW.softmax(-1)
    for top_p in (0.1, 0.6, 0.9):
        kept = int((p.cumsum(0) - p < top_p).sum())
        expected = torch.zeros(6)
        expected[:kept] = ROW[:kept].softmax(-1)
        near(draws(ROW, top_p=top_p), expected)


def test_top_p_is_taken_of_what_top_k_left() -> None:
    p = ROW[:3].softmax(-1)
    assert p[0] < 0.65 < p[0] + p[1] and ROW.softmax(-1)[:2].sum() > 0.65
    expected = torch.zeros(6)
    expected[:2] = ROW[:2].softmax(-1)
    near(draws(ROW, top_k=3, top_p=0.65), expected)


def test_min_p() -> None:
    p = ROW.softmax(-1)
    kept = p >= 0.2 * p.max()
    expected = torch.where(kept, ROW, -torch.inf).softmax(-1)
    near(draws(ROW, min_p=0.2), expected)
    assert draws(ROW, 500, min_p=1.0)[0] == 1


@pytest.mark.parametrize("params", [{"top_p": 0.5}, {"top_p": 0.999}, {"top_k": 300}, {"top_k": 50, "top_p": 0.9}])
def test_filters_over_a_vocabulary_wider_than_the_candidates(params: dict[str, Any]) -> None:
    p, ids = WIDE.double().softmax(-1).sort(descending=True)
    kept = p.clone()
    kept[params.get("top_k", 700) :] = 0
    total = kept.sum()
    kept[kept.cumsum(0) - kept >= params.get("top_p", 1.0) * total] = 0
    expected = torch.zeros(700, dtype=torch.float64)
    expected[ids] = kept / kept.sum()
    near(draws(WIDE, **params), expected.float())


def test_a_row_does_not_depend_on_the_others() -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"top_p": 0.5},
        {"top_p": 0.9999},
        {"top_k": 40, "temperature": 1.5},
        {"min_p": 0.05, "top_k": 400},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
    ]
    sequences = [sequence([3, 4], [5, 6, 5][: i % 4], seed=i, **kinds[i % len(kinds)]) for i in range(40)]
    rows = torch.randn(40, 700, generator=torch.Generator().manual_seed(1)) * 3
    alone = [sample(rows[i : i + 1].clone(), [sequences[i]])[0][0] for i in range(40)]
    assert sample(rows.clone(), sequences)[0] == alone
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2)).tolist()
    assert sample(rows[order].clone(), [sequences[i] for i in order])[0] == [alone[i] for i in order]


def test_the_seed_and_the_position_both_count() -> None:
    flat = torch.zeros(1, 5000)
    first = [sample(flat.clone(), [sequence([1] * n, seed=7)])[0][0] for n in range(1, 40)]
    assert first == [sample(flat.clone(), [sequence([2] * n, seed=7)])[0][0] for n in range(1, 40)]
    assert len(set(first)) > 35
    assert first != [sample(flat.clone(), [sequence([1] * n, seed=8)])[0][0] for n in range(1, 40)]


def test_random_bits() -> None:
    pairs = [(seed, position) for seed in (0, 1, 2**63, -5) for position in range(2000)]
    numbers = torch.tensor([random_bits(*pair) / 2**64 for pair in pairs], dtype=torch.float64)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert (torch.histc(numbers, 10, 0, 1) / 8000 - 0.1).abs().max() < 0.02
    assert torch.corrcoef(numbers.view(4, 2000)).fill_diagonal_(0).abs().max() < 0.1
    # The first two words of Philox4x32-10, key 0 and counter 0, as its authors publish them.
    assert random_bits(0, 0) == 0xE169C58D_6627E8D5
    assert random_bits(-1, 3) == random_bits(2**64 - 1, 3) != random_bits(2**32 - 1, 3)


@pytest.mark.slow
def test_random_words() -> None:
    def word(bits: int, token: int) -> int:
        mask = 0xFFFFFFFF
        x = token * 0x9E3779B9 + bits & mask
        x = (x ^ x >> 16) * 0x21F0AAAD + (bits >> 32) & mask
        x = (x ^ x >> 15) * 0xD35A2D97 & mask
        return x ^ x >> 15

    bits = [random_bits(seed, position) for seed in range(100) for position in range(100)]
    words = random_words(bits, 1000)
    assert words.shape == (10_000, 1000) and words.dtype == np.uint32
    assert [[int(w) for w in row[::333]] for row in words[:20]] == [
        [word(b, token) for token in range(0, 1000, 333)] for b in bits[:20]
    ]
    # Uniform within a row, within a column, and at every bit; neighbours (token, position, seed) are not alike.
    share = torch.from_numpy(words / 2.0**32)
    for dim, num in ((0, 10_000), (1, 1000)):
        assert ((share.mean(dim) - 0.5).abs() < 5.5 * (1 / 12 / num) ** 0.5).all()
    assert ((torch.histc(share, 1000) / 10_000) - 1).abs().max() < 0.06
    for bit in range(32):
        ones = torch.from_numpy((words >> np.uint32(bit) & np.uint32(1)).astype(np.float32))
        assert abs(ones.mean().item() - 0.5) < 1e-3
    cube = share.view(100, 100, 1000) - 0.5
    for one, other in ((cube[1:], cube[:-1]), (cube[:, 1:], cube[:, :-1]), (cube[..., 1:], cube[..., :-1])):
        assert abs((one * other).mean().item() * 12) < 5 / 9.9e6**0.5


def test_flat_rows_are_won_by_every_token_as_often() -> None:
    """Chi-squared over 32 tokens, and over the pairs that win at two positions, or with two seeds, in a row."""
    wins = torch.tensor(
        [
            sample(torch.zeros(100, 32), [sequence([1] * (1 + n), seed=seed) for n in range(100)])[0]
            for seed in range(400)
        ]
    )

    def chi_squared(counts: torch.Tensor) -> float:
        expected = counts.sum() / counts.numel()
        return float(((counts - expected) ** 2 / expected).sum())

    assert chi_squared(torch.bincount(wins.flatten(), minlength=32).double()) < 31 + 5 * (2 * 31) ** 0.5
    for one, other in ((wins[:, 1:], wins[:, :-1]), (wins[1:], wins[:-1])):
        pairs = torch.bincount((one * 32 + other).flatten(), minlength=1024).double()
        assert chi_squared(pairs) < 1023 + 5 * (2 * 1023) ** 0.5


FLAT = torch.randn(16_000, generator=torch.Generator().manual_seed(4)) * 0.1
PEAKED = torch.randn(16_000, generator=torch.Generator().manual_seed(5)) * 3


@pytest.mark.parametrize("row", [FLAT, PEAKED], ids=["flat", "peaked"])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.8}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.05}])
@pytest.mark.slow
def test_noise_of_rounding_size_changes_hardly_any_draw(row: torch.Tensor, params: dict[str, Any]) -> None:
    """Company changes the order of sums and so the last bits of every logit. The first two of a race are closer than
    d with probability below d, so noise of 1e-3 changes about one draw in a thousand. (Of flat logits top-k keeps other
    tokens, too.) A look-up in the cumulative distribution changed 4 to 70 of a hundred."""
    sequences = [sequence(seed=seed, **params) for seed in range(200)]
    drawn = sample(row.repeat(200, 1), sequences)[0]
    noise = torch.randn(200, len(row), generator=torch.Generator().manual_seed(6)) * 1e-3
    changed = sum(a != b for a, b in zip(drawn, sample(row + noise, sequences)[0], strict=True))
    assert len(set(drawn)) > (100 if row is FLAT and "top_k" not in params else 5)
    assert changed <= (10 if row is FLAT and "top_k" in params else 2)


@pytest.mark.parametrize("size", [6, 700])
def test_equally_likely_tokens_rank_by_id_and_race_by_their_own_numbers(size: int) -> None:
    row = torch.zeros(size)
    row[[3, 5]] = 2.0
    for params, kept in (
        ({}, list(range(size))),
        ({"top_k": 3}, [0, 3, 5]),
        ({"top_k": 1}, [3]),
        ({"top_k": size - 2}, sorted([3, 5, *[i for i in range(size) if i not in (3, 5)][: size - 4]])),
        ({"top_k": 2, "top_p": 0.5}, [3]),
        ({"top_k": 2, "top_p": 0.51}, [3, 5]),
    ):
        sequences = [sequence(seed=seed, **params) for seed in range(300)]
        tokens = sample(row.repeat(300, 1), sequences)[0]
        words = random_words([random_bits(seed, 1) for seed in range(300)], size)
        scores = row.double().numpy() - np.log(-np.log1p(-(words + 0.5) / 2.0**32))
        assert tokens == [kept[i] for i in scores[:, kept].argmax(-1)]


def test_penalties_and_bias() -> None:
    def best(**params: Any) -> int:
        row = torch.tensor([[1.0, 0.9, 0.8, -0.5]])
        return sample(row, [sequence([0], [1, 1], temperature=0.0, **params)])[0][0]

    assert best() == 0
    assert best(repetition_penalty=2.0) == 2  # prompt and output
    assert best(presence_penalty=0.5) == 0  # output only
    assert best(logit_bias={1: 0.05}) == 0
    assert best(logit_bias={1: 0.3}) == 1
    assert best(logit_bias={1: 0.3}, presence_penalty=0.15) == 1  # 1.05
    assert best(logit_bias={1: 0.3}, frequency_penalty=0.15) == 0  # 0.9: it occurred twice
    assert best(logit_bias={3: 100.0}) == 3
    row = torch.tensor([[-1.0, -1.5, -3.0]])
    assert sample(row, [sequence([0], temperature=0.0, repetition_penalty=2.0)])[0] == [1]


def test_stop_tokens_wait_for_min_tokens() -> None:
    row = torch.tensor([[1.0, 5.0, 4.0]])
    params: dict[str, Any] = {"temperature": 0.0, "stop_token_ids": (1, 2), "min_tokens": 2}
    assert sample(row.clone(), [sequence(output=[0], **params)])[0] == [0]
    assert sample(row.clone(), [sequence(output=[0, 0], **params)])[0] == [1]


def test_logprobs() -> None:
    sequences = [
        sequence(temperature=0.0, top_logprobs=2, logit_bias={4: 50.0}),
        sequence(temperature=0.0, top_logprobs=0),
    ]
    sequences.append(sequence(temperature=0.0))
    tokens, logprobs = sample(ROW.repeat(3, 1), sequences)
    table = ROW.log_softmax(-1)
    assert tokens == [4, 0, 0]
    first, second, third = logprobs
    assert first is not None and first.logprob == pytest.approx(table[4].item())
    assert [token for token, _ in first.top] == [0, 1]
    assert [value for _, value in first.top] == pytest.approx(table[:2].tolist())
    assert second is not None and second.top == [] and second.logprob == pytest.approx(table[0].item())
    assert third is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_gives_minus_one_and_spares_the_others(bad: float) -> None:
    rows = ROW.repeat(3, 1)
    rows[1, 3] = bad
    sequences = [sequence(temperature=0.0, top_logprobs=1), sequence(top_logprobs=1), sequence(temperature=0.0)]
    tokens, logprobs = sample(rows, sequences)
    assert tokens == [0, -1, 0]
    assert logprobs[1] is None and logprobs[0] is not None
