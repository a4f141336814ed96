"""The sampler's kernels find what torch finds, and the same bits with every instruction set."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptq_api.runner.cpu import native
from gptq_api.runner.cpu.native_sampler import log_softmax, sample
from gptq_api.runner.cpu.sampler import sample as sample_by_torch
from gptq_api.runner.seats import Seat
from gptq_api.types import SamplingParams, TokenLogprobs

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.MISSING)
SETS = native._cpu.instruction_sets() if native.is_available() else []

CHOICES: dict[str, list[Any]] = {
    "seed": [0, -1, 2**63 - 1, 12345],
    "temperature": [0.0, 1e-6, 1e-3, 0.3, 0.7, 1.0, 1.0, 1.5, 2.0, 100.0],
    "top_p": [1.0, 1.0, 0.0, 1e-9, 0.1, 0.5, 0.9, 0.95, 0.99, 0.9999999],
    "top_k": [0, 0, 0, 1, 2, 40, 127, 128, 129, 300, 5000, 10**6, 10**12],
    "min_p": [0.0, 0.0, 0.0, 0.0, 1e-7, 0.001, 0.05, 0.5, 1.0],
    "repetition_penalty": [1.0, 1.0, 1.0, 0.5, 1.3],
    "presence_penalty": [0.0, 0.0, 0.0, -1.5, 0.3],
    "frequency_penalty": [0.0, 0.0, 0.0, -0.4, 0.7],
    "logit_bias": [{}, {}, {}, {3: 5.0, 0: -100.0, 5: 100.0}],
    "min_tokens": [0, 0, 0, 9],
    "top_logprobs": [None, None, 0, 1, 5, 20],
}
SIZES = [6, 63, 64, 65, 700, 2048, 4097, 32001]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Case:
    """Some rows of one size, with parameters of all kinds."""

    def __init__(self, seed: int, size: int, num: int = 12) -> None:
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        noise = torch.randn(num, size, generator=generator)
        scales = torch.rand(num, 1, generator=generator) * 1e4
        kinds = [
            noise * 3,
            noise * 0.02,
            (noise * 2).round(),
            noise * 0,
            (noise > 0) * -1.0,
            noise * 10,
            noise * scales,
        ]
        self.logits: Tensor = kinds[seed % len(kinds)].contiguous()
        self.seats: list[Seat] = []
        self.masks: dict[int, NDArray[np.int32]] = {}
        for row in range(num):
            prompt = [rng.randrange(min(size, 50)) for _ in range(rng.randrange(1, 60))]
            output = [rng.randrange(min(size, 20)) for _ in range(rng.randrange(23))]
            params = {name: rng.choice(values) for name, values in CHOICES.items()} | {"stop_token_ids": (1, 2, 5)}
            if rng.random() < 0.1:
                self.masks[row] = self._mask(rng, size)
                params["grammar"] = "one"
            if rng.random() < 0.05:
                self.logits[row, rng.randrange(size)] = rng.choice([torch.nan, torch.inf, -torch.inf])
            self.seats.append(Seat(prompt + output, len(prompt), SamplingParams(max_tokens=100, **params)))

    @staticmethod
    def _mask(rng: random.Random, size: int) -> NDArray[np.int32]:
        bits = np.random.default_rng(rng.getrandbits(32)).random(size) < rng.choice([0.001, 0.5, 0.999])
        bits[rng.randrange(size)] = True
        words = np.zeros(-(-size // 32) * 4, np.uint8)
        packed = np.packbits(bits, bitorder="little")
        words[: len(packed)] = packed
        return words.view(np.int32)

    def by_kernels(self, rows: slice = slice(None)) -> tuple[list[int], list[TokenLogprobs | None]]:
        chosen = range(*rows.indices(len(self.seats)))
        masks = {i: self.masks[row] for i, row in enumerate(chosen) if row in self.masks}
        return sample(self.logits[rows].clone(), self.seats[rows], masks)


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQ_CPU_INSTRUCTION_SET", request.param)


def alike(found: TokenLogprobs | None, expected: TokenLogprobs | None) -> None:
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    assert found.logprob == pytest.approx(expected.logprob, rel=1e-5, abs=1e-5)
    assert [v for _, v in found.top] == pytest.approx([v for _, v in expected.top], rel=1e-5, abs=1e-5)
    assert len({token for token, _ in found.top}) == len(found.top)
    # Of equal ones torch takes any; ours are in the order of their ids.
    assert found.top == sorted(found.top, key=lambda entry: (-entry[1], entry[0]))


@pytest.mark.parametrize("size", SIZES)
def test_the_tokens_of_torch(size: int, instruction_set: None) -> None:
    for seed in range(28 if size < 20_000 else 14):
        case = Case(seed, size)
        expected, expected_logprobs = sample_by_torch(case.logits.clone(), case.seats, case.masks)
        tokens, logprobs = case.by_kernels()
        assert tokens == expected, (seed, [case.seats[i].params for i, t in enumerate(tokens) if t != expected[i]])
        for found, other in zip(logprobs, expected_logprobs, strict=True):
            alike(found, other)


@pytest.mark.parametrize("size", [65, 4097, 32001])
def test_every_instruction_set_finds_the_same_bits(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(7):
        found = []
        for name in SETS:
            monkeypatch.setenv("GPTQ_CPU_INSTRUCTION_SET", name)
            found.append(Case(seed, size, 40).by_kernels())
        assert all(other == found[0] for other in found)


def test_a_row_is_a_function_of_itself_on_any_number_of_threads() -> None:
    case = Case(0, 32001, 40)
    before = native.num_threads()
    try:
        native.use_threads(1)
        alone = [case.by_kernels(slice(row, row + 1)) for row in range(40)]
        for num_threads in (1, 2, 3):
            native.use_threads(num_threads)
            tokens, logprobs = case.by_kernels()
            assert [([t], [p]) for t, p in zip(tokens, logprobs, strict=True)] == alone
    finally:
        native.use_threads(before)


def test_a_sequence_that_grows_or_falls_back_is_the_one_it_is() -> None:
    """What a seat keeps for the kernels follows its tokens and parameters."""
    row = torch.randn(1, 300, generator=torch.Generator().manual_seed(1))
    penalties: dict[str, Any] = {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "temperature": 0.0}

    def seat(tokens: list[int], **params: Any) -> Seat:
        return Seat(list(tokens), 2, SamplingParams(max_tokens=9, **{**penalties, **params}))

    grown, tokens = seat([1, 2]), [1, 2]
    for _ in range(30):
        (token,), _ = sample(row.clone(), [grown])
        assert sample(row.clone(), [seat(tokens)])[0] == [token]
        tokens.append(token)
        grown.token_ids.append(token)
    assert len(set(tokens)) > 5
    del grown.token_ids[4:]
    assert sample(row.clone(), [grown])[0] == sample(row.clone(), [seat(tokens[:4])])[0]
    grown.params = seat([1, 2], repetition_penalty=1.0, frequency_penalty=0.0).params
    assert sample(row.clone(), [grown])[0] == [int(row.argmax())]


def test_rows_may_be_apart() -> None:
    wide = torch.randn(5, 1000, generator=torch.Generator().manual_seed(2))
    seats = [Seat([1], 1, SamplingParams(max_tokens=1, seed=i, top_p=0.9)) for i in range(5)]
    expected = sample(wide[:, :700].contiguous(), seats)
    assert sample(wide.clone()[:, :700], seats) == expected


def test_ids_that_no_row_has_change_nothing() -> None:
    params: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 2.0}
    odd = SamplingParams(max_tokens=1, logit_bias={70: 9.0, -1: 9.0}, stop_token_ids=(64, -2), min_tokens=3, **params)
    row = torch.arange(64.0)[None]
    assert sample(row.clone(), [Seat([3, 64, -5], 3, odd)])[0] == [63]


@pytest.mark.parametrize("vocab_size", [5, 64, 2048, 32003])
def test_log_softmax_is_what_sample_tells(vocab_size: int) -> None:
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 5
    logits[2, vocab_size // 2] = torch.nan
    seats = [Seat([1], 1, SamplingParams(max_tokens=1, temperature=0, top_logprobs=3)) for _ in range(4)]
    tokens, told = sample(logits.clone(), seats)
    table = log_softmax(logits.clone())
    assert table[2].isnan().all() and tokens[2] == -1
    for row in (0, 1, 3):
        found = told[row]
        assert found is not None and table[row, tokens[row]].item() == found.logprob
        assert [table[row, token].item() for token, _ in found.top] == [value for _, value in found.top]
        assert torch.allclose(table[row], logits[row].double().log_softmax(-1).float(), rtol=0, atol=4e-6)
