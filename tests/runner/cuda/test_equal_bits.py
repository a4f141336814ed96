"""With --batch-invariant a request gets the same tokens and logprobs, to the last bit, whatever goes on beside it:
alone, among 31 others, in chunks, preempted, behind a cached prefix, with drafts, a step ahead or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gptq_api.errors import ConfigError
from gptq_api.kernels import gemm
from gptq_api.runner.cuda.runner import CudaRunner
from gptq_api.scheduler.drafts import PastAnswers, TextDrafts
from tests.runner.cpu.test_equal_bits import COMPANY, NUM_BLOCKS, NUM_TOKENS, SUBJECTS, Answer, answers
from tests.runner.cuda.test_model import FAST, WIDE, load
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.draft_sources import Garbage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available"),
]
MODELS: dict[str, tuple[Recipe | None, dict[str, Any]]] = {
    "demo, fp16": (None, {"dtype": "float16"}),
    "demo, bf16": (None, {"dtype": "bfloat16"}),
    "wide, fp16": (WIDE, {"dtype": "float16"}),
    "wide, act-order, asymmetric, bf16": (replace(WIDE, act_order=True, sym=False), {"dtype": "bfloat16"}),
    "window": (replace(FAST, family="mistral", more_config={"sliding_window": 40}), {"dtype": "float16"}),
    "norms of heads, one group, fp8 cache": (
        replace(FAST, family="qwen3", tie=True, group_size=-1, act_order=False),
        {"dtype": "float16", "kv_cache_dtype": "fp8"},
    ),
    "8 bits, head in 8 bits, fp16": (replace(WIDE, bits=8, act_order=True), {"dtype": "float16", "lm_head_bits": 8}),
    "quantized head, bf16": (replace(FAST, sym=False, quantize_head=True), {"dtype": "bfloat16"}),
    "biases": (replace(FAST, family="qwen2", attention_bias=True), {"dtype": "bfloat16"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_request_gets_the_same_bits_whatever_goes_on_beside_it(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe, settings = MODELS[name]
    path = "demo" if recipe is None else write_checkpoint(tmp_path_factory.mktemp("bits"), random_model(recipe))
    runner: Any = load(path, num_blocks=NUM_BLOCKS, max_num_seqs=COMPANY, batch_invariant=True, **settings)
    assert isinstance(runner, CudaRunner) and runner.max_draft_rows == 8
    everybody = range(COMPANY)
    alone = [answers(runner, range(i, i + 1))[0][0] for i in range(SUBJECTS)]
    assert all(len(one.tokens) == len(one.logprobs) == NUM_TOKENS for one in alone)

    def same(found: list[Answer]) -> bool:
        return found[:SUBJECTS] == alone

    assert same(answers(runner, everybody)[0]), "among others"
    assert same(answers(runner, everybody, budget=37)[0]), "in chunks"
    found, counters = answers(runner, everybody, preempts=True)
    assert same(found) and counters.preemptions > 5, "preempted"
    found, counters = answers(runner, everybody, caching=True, times=2)
    assert same(found) and counters.prefix_hits > 1000, "behind a cached prefix"
    runner.lookahead = 0
    assert same(answers(runner, everybody, budget=61)[0]), "in turn"
    runner.lookahead = 1
    for source in (Garbage(runner.vocab_size), TextDrafts(PastAnswers())):
        for i in range(SUBJECTS):
            assert answers(runner, range(i, i + 1), source=source, times=2)[0] == alone[i : i + 1], "with drafts"
        found, counters = answers(runner, range(4), source=source, preempts=True)
        assert found == alone[:4] and counters.drafts > 0, "several with drafts"


def test_seeds_give_the_same_text_alone_and_among_others() -> None:
    """Each of 32, drawn in five ways."""
    runner: Any = load("demo", num_blocks=2000, max_num_seqs=COMPANY, batch_invariant=True)
    everybody = range(COMPANY)
    together, _ = answers(runner, everybody)
    for i in everybody:
        assert answers(runner, range(i, i + 1))[0] == [together[i]], i


def test_what_cublas_multiplies_is_refused_by_name(tmp_path_factory: pytest.TempPathFactory) -> None:
    dense = write_checkpoint(tmp_path_factory.mktemp("dense"), random_model(replace(FAST, dense=("down_proj",))))
    with pytest.raises(ConfigError, match="--batch-invariant: cuBLAS multiplies by down of layer 0 and 1 more"):
        load(dense, batch_invariant=True)
    with pytest.raises(ConfigError, match=r"do not serve this model \(it computes in float32\), and cuBLAS adds up"):
        load("demo", batch_invariant=True, dtype="float32")
