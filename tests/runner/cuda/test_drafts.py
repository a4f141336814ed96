"""Steps with drafted tokens on a CUDA device: the tokens and logprobs of steps without, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_api.kernels import gemm
from gptq_api.runner.cuda.runner import CudaRunner
from gptq_api.runner.solo import step_of
from gptq_api.types import SamplingParams
from tests.runner.cuda.test_model import FAST, WIDE, load, rambling
from tests.support.checkpoints import random_model, write_checkpoint
from tests.support.drafting import BLOCKS_EACH, NUM_TOKENS, Text, generate, nothing, with_drafts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available"),
]
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "top_logprobs": 3},
    "drawn": {"temperature": 0.8, "seed": 7, "top_logprobs": 0},
    "cut": {"temperature": 1.0, "seed": 8, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
    "penalised": {"temperature": 0.9, "seed": 9, "repetition_penalty": 1.3, "presence_penalty": 0.5, "top_logprobs": 2},
    "biased": {"temperature": 0.0, "logit_bias": {77: 2.0}, "frequency_penalty": 0.7, "top_logprobs": 1},
    "no end yet": {"temperature": 0.7, "seed": 11, "min_tokens": 30, "stop_token_ids": tuple(range(256))},
    "in a grammar": {"temperature": 0.0, "grammar": "all that its masks allow"},
}


@pytest.fixture(
    scope="module",
    params=["fp16", "bf16", "act-order", "window", "fp8 cache", "qwen3", "a key head each", "one key head"],
)
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CudaRunner]:
    recipe, settings = {
        "fp16": (WIDE, {"dtype": "float16"}),
        "bf16": (WIDE, {"dtype": "bfloat16"}),
        "act-order": (replace(WIDE, act_order=True, sym=False), {"dtype": "float16"}),
        "window": (replace(WIDE, family="mistral", more_config={"sliding_window": 40}), {"dtype": "float16"}),
        "fp8 cache": (FAST, {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}),
        "qwen3": (replace(FAST, family="qwen3", tie=True), {"dtype": "float16"}),
        "a key head each": (replace(WIDE, num_kv_heads=8), {"dtype": "float16"}),
        "one key head": (replace(WIDE, num_kv_heads=1), {"dtype": "bfloat16"}),
    }[request.param]
    folder: Path = write_checkpoint(tmp_path_factory.mktemp("model"), random_model(recipe))
    loaded = load(folder, num_blocks=1 + 4 * BLOCKS_EACH, max_num_seqs=4, **settings)
    assert isinstance(loaded, CudaRunner) and loaded.max_draft_rows == 8
    yield loaded


def prompts_of(num: int) -> list[list[int]]:
    return [[token % 500 + 3 for token in ids] for ids in rambling(num, seed=4)]


@pytest.mark.parametrize("names", [*((name,) for name in PARAMS), ("greedy", "penalised"), tuple(PARAMS)[3:]])
def test_drafts_change_no_bit(runner: CudaRunner, names: tuple[str, ...]) -> None:
    """Right ones, wrong ones, ones that go wrong in the middle, and some now and then; one, two and four sequences."""
    params = [SamplingParams(max_tokens=NUM_TOKENS, **PARAMS[name]) for name in names]
    prompts = prompts_of(len(names))
    plain = generate(runner, prompts, params, nothing)

    def truth(sequence: int, output: list[int]) -> list[int]:
        return plain[sequence].output[len(output) :]

    def garbage(sequence: int, output: list[int]) -> list[int]:
        return [5, 6, 7, 8, 9, 10, 11]

    def changes_its_mind(sequence: int, output: list[int]) -> list[int]:
        right = truth(sequence, output)
        return [*right[: len(output) % 4], 3, *right[len(output) % 4 + 1 :]]

    turn = itertools.count()

    def now_and_then(sequence: int, output: list[int]) -> list[int]:
        return truth(sequence, output)[: next(turn) % 3]

    for source in (truth, garbage, changes_its_mind, now_and_then):
        texts = generate(runner, prompts, params, source)
        for name, text, expected in zip(names, texts, plain, strict=True):
            assert text.output == expected.output, (source.__name__, name)
            assert text.logprobs == expected.logprobs, (source.__name__, name)


def test_a_row_has_the_logits_that_it_has_alone(runner: CudaRunner) -> None:
    prompt, params = prompts_of(3)[2], SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    [plain] = generate(runner, [prompt], [params], nothing)
    text = Text(prompt, params, 0)
    runner.collect(runner.launch(step_of([text.solo], [len(prompt)])))
    alone = []
    for token in plain.output[:8]:
        text.solo.token_ids.append(token)
        alone.append(runner.logits(step_of([text.solo], [1]))[0].clone())
    text.solo.num_computed_tokens -= 8
    text.solo.token_ids = text.solo.token_ids[:-7]
    step = with_drafts(step_of([text.solo], [1]), {0: plain.output[1:8]})
    together, rows = runner.logits(step)
    assert rows == list(range(8))
    for row, expected in enumerate(alone):
        assert torch.equal(together[row], expected[0]), row


def test_a_rejected_row_that_is_not_finite_leaves_no_trace(tmp_path: Path) -> None:
    runner = load(write_checkpoint(tmp_path, random_model(FAST)), num_blocks=1 + BLOCKS_EACH, max_num_seqs=1)
    assert isinstance(runner, CudaRunner)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    [plain] = generate(runner, prompts_of(1), [params], nothing)
    sick = next(token for token in range(3, 500) if token not in {*plain.output, *prompts_of(1)[0]})
    runner._model._embedding[sick] = torch.nan
    [text] = generate(runner, prompts_of(1), [params], lambda sequence, output: [sick, sick])
    assert text.output == plain.output
    assert all(bool(torch.isfinite(layer).all()) for layer in runner._cache.layers)


def test_a_model_that_cublas_multiplies_takes_no_drafts(tmp_path: Path) -> None:
    runner = load(write_checkpoint(tmp_path, random_model(replace(FAST, dense=("down_proj",)))), num_blocks=20)
    assert runner.max_draft_rows == 0
