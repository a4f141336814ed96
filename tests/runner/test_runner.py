"""What a sequence gets does not depend on its neighbours, on chunks, on preemption or on shared blocks: bit for bit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from gptq_api.checkpoint.checkpoint import open_checkpoint
from gptq_api.errors import ConfigError
from gptq_api.model.modules import config_of
from gptq_api.runner.backends import choose_backend
from gptq_api.runner.cpu.runner import CpuRunner
from gptq_api.runner.load import load_runner
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.solo import Solo, step_of
from gptq_api.step import PromptRows, Sampled
from gptq_api.types import SamplingParams, TokenLogprobs
from tests.support.checkpoints import Recipe, random_model, write_checkpoint

BLOCK = 16
RECIPE = Recipe(hidden_size=96, num_heads=6, num_kv_heads=2, max_position_embeddings=512, act_order=True, sym=False)


def settings(folder: Path, **more: Any) -> LoadOptions:
    return LoadOptions(model_path=str(folder), **{"device": "cpu", "kv_cache_mib": 16, "num_threads": 1, **more})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("runner"), random_model(RECIPE))


@pytest.fixture(scope="module", params=["auto", "float32", "bfloat16"])
def runner(request: pytest.FixtureRequest, folder: Path) -> Iterator[CpuRunner]:
    loaded: Any = load_runner(settings(folder, dtype=request.param))
    yield loaded


class Blocks:
    """Hands out block ids in random order, so that no test passes by neighbouring blocks."""

    def __init__(self, runner: CpuRunner, seed: int = 0) -> None:
        self._free = list(range(runner.num_blocks))
        random.Random(seed).shuffle(self._free)
        self.num_seats = 0

    def take(self, num_tokens: int) -> list[int]:
        return [self._free.pop() for _ in range(-(-num_tokens // BLOCK))]


def prompts(num: int, seed: int = 1, longest: int = 300) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 96) for _ in range(rng.choice([1, 5, 16, 33, 100, 257, longest]))] for _ in range(num)]


def sequence(ids: list[int], blocks: Blocks, num_output: int = 30, **params: Any) -> Solo:
    made = SamplingParams(**{"max_tokens": num_output, "temperature": 0.0, **params})
    blocks.num_seats += 1
    return Solo(list(ids), made, blocks.take(len(ids) + num_output), seat=blocks.num_seats)


def step(runner: CpuRunner, sequences: list[Solo], num_new: list[int]) -> None:
    """What scheduler and engine do around a step."""
    sampled = runner.collect(runner.launch(step_of(sequences, num_new)))
    tokens = iter(sampled.tokens)
    for s, num in zip(sequences, sampled.num_tokens, strict=True):
        for token in itertools.islice(tokens, num):
            assert token >= 0
            s.token_ids.append(token)


def finish(runner: CpuRunner, s: Solo, num_output: int, chunk: int = 10**6) -> list[int]:
    while s.num_output_tokens < num_output:
        step(runner, [s], [min(chunk, s.num_pending_tokens)])
    return s.token_ids[s.num_prompt_tokens :]


def test_neighbours_and_chunks_change_nothing(runner: CpuRunner) -> None:
    texts = prompts(10)
    alone = [finish(runner, sequence(ids, Blocks(runner, i)), 8) for i, ids in enumerate(texts)]
    blocks = Blocks(runner)
    together = [sequence(ids, blocks) for ids in texts]
    rng = random.Random(7)
    while live := [s for s in together if s.num_output_tokens < 8]:
        chosen = rng.sample(live, rng.randint(1, len(live)))
        step(runner, chosen, [rng.randint(1, min(64, s.num_pending_tokens)) for s in chosen])
    assert [s.token_ids[s.num_prompt_tokens :] for s in together] == alone


@pytest.mark.parametrize("num_threads", [1, 2])
def test_logits_are_the_same_bits_alone_and_in_company(runner: CpuRunner, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    texts = prompts(9, seed=3)
    blocks = Blocks(runner)
    together = [sequence(ids, blocks) for ids in texts]
    batched, sampling = runner.logits(step_of(together, [len(ids) for ids in texts]))
    assert sampling == list(range(9))
    for i, ids in enumerate(texts):
        one = sequence(ids, Blocks(runner, i))
        assert torch.equal(runner.logits(step_of([one], [len(ids)]))[0][0], batched[i])
    torch.set_num_threads(1)


def test_the_last_logits_of_a_prompt_are_the_same_however_it_is_cut(runner: CpuRunner) -> None:
    ids = prompts(1, seed=4, longest=300)[0] + [7] * 250
    whole = sequence(ids, Blocks(runner))
    expected = runner.logits(step_of([whole], [len(ids)]))[0]
    for cuts in ([1], [16, 17, 100], list(range(1, 40))):
        s = sequence(ids, Blocks(runner, 5))
        for cut in cuts:
            step(runner, [s], [cut - s.num_computed_tokens])
        got = runner.logits(step_of([s], [s.num_pending_tokens]))[0]
        assert torch.equal(got, expected)


def test_recompute_after_preemption_continues_the_same_text(runner: CpuRunner) -> None:
    for i, ids in enumerate(prompts(3, seed=5)):
        expected = finish(runner, sequence(ids, Blocks(runner, i)), 12)
        s = sequence(ids, Blocks(runner, i + 1))
        finish(runner, s, 5)
        s.block_table = Blocks(runner, i + 2).take(len(ids) + 30)
        s.num_computed_tokens, s.num_told_blocks = 0, None
        assert finish(runner, s, 12, chunk=50) == expected


def test_blocks_of_a_shared_prefix_may_be_written_in_the_very_step_that_reads_them(runner: CpuRunner) -> None:
    shared = prompts(1, seed=6)[0][:1] * 3 + list(range(10, 10 + 2 * BLOCK - 3))
    tails = [[5, 6, 7], [8], [9] * 20]
    alone = [finish(runner, sequence(shared + tail, Blocks(runner, i)), 10) for i, tail in enumerate(tails)]
    blocks = Blocks(runner)
    sequences = [sequence(shared + tail, blocks) for tail in tails]
    for s in sequences[1:]:
        s.block_table[:2] = sequences[0].block_table[:2]
        s.num_computed_tokens = 2 * BLOCK
    # The readers come first: the order in the batch must not matter.
    order = [sequences[1], sequences[2], sequences[0]]
    step(runner, order, [s.num_pending_tokens for s in order])
    while sequences[0].num_output_tokens < 10:
        step(runner, order, [1, 1, 1])
    assert [s.token_ids[s.num_prompt_tokens :] for s in sequences] == alone


def test_seeded_sampling_does_not_depend_on_neighbours(runner: CpuRunner) -> None:
    params: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 11, "presence_penalty": 0.5}
    ids = prompts(1, seed=8)[0]
    alone = finish(runner, sequence(ids, Blocks(runner), **params), 12)
    blocks = Blocks(runner, 9)
    s = sequence(ids, blocks, **params)
    others = [sequence(p, blocks, temperature=1.0, seed=i) for i, p in enumerate(prompts(7, seed=9))]
    step(runner, [*others, s], [o.num_pending_tokens for o in others] + [len(ids)])
    while s.num_output_tokens < 12:
        step(runner, [*others[:4], s, *others[4:]], [1] * 8)
    assert s.token_ids[len(ids) :] == alone


def test_logprobs_are_those_of_the_raw_logits(runner: CpuRunner) -> None:
    ids = prompts(1, seed=10)[0]
    s = sequence(ids, Blocks(runner), temperature=0.7, top_logprobs=3, logit_bias={5: 100.0})
    table = runner.logits(step_of([s], [len(ids)]))[0][0].log_softmax(-1)
    s.num_computed_tokens = 0
    sampled = runner.collect(runner.launch(step_of([s], [len(ids)])))
    assert sampled.tokens == [5]
    found = sampled.logprobs[0]
    assert found.logprob == pytest.approx(table[5].item(), abs=1e-5)
    values, tokens = table.topk(3)
    assert [t for t, _ in found.top] == tokens.tolist()
    assert [v for _, v in found.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_logprobs_of_a_prompt_are_the_same_bits_however_it_is_cut_and_beside_whom(runner: CpuRunner) -> None:
    ids = prompts(1, seed=12, longest=300)[0] + list(range(5, 90)) + [7] * 150
    whole = sequence(ids, Blocks(runner))
    logits = runner.logits(step_of([whole], [len(ids)]), every_row=True)[0]
    table = runner._log_softmax(logits.clone())  # the sampler's own
    assert torch.allclose(table, logits.double().log_softmax(-1).float(), rtol=0, atol=2e-6)
    values, tokens = table.topk(3)
    for cuts in ([], [1], [16, 17, 100], list(range(1, 40))):
        blocks = Blocks(runner, 3)
        s, other = sequence(ids, blocks), sequence([9] * 60, blocks)
        told: list[tuple[TokenLogprobs, int]] = []
        for cut in [*cuts, len(ids)]:
            first, num = s.num_computed_tokens, min(cut, len(ids) - 1) - s.num_computed_tokens
            asked = {1: PromptRows(first, num, 3)} if num else {}
            both = step_of([other, s], [1, cut - first])
            found = runner.collect(runner.launch(msgspec.structs.replace(both, prompt_rows=asked)))
            assert found.prompt_logprobs.keys() == asked.keys()
            told += found.prompt_logprobs[1].unpacked() if num else []
        assert [entry.logprob for entry, _ in told] == table[:-1].gather(1, torch.tensor(ids[1:])[:, None])[
            :, 0
        ].tolist()
        assert [[value for _, value in entry.top] for entry, _ in told] == values[:-1].tolist()
        assert [entry.top[0][0] for entry, _ in told] == tokens[:-1, 0].tolist()
        likelier = (table[:-1] > table[:-1].gather(1, torch.tensor(ids[1:])[:, None])).sum(-1)
        assert [rank for _, rank in told] == (likelier + 1).tolist()


def test_a_chunk_that_ends_before_the_last_token_samples_nothing(runner: CpuRunner) -> None:
    s = sequence([5] * 40, Blocks(runner))
    assert runner.collect(runner.launch(step_of([s], [39]))) == Sampled([0], [])
    assert runner.collect(runner.launch(step_of([], []))) == Sampled([], [])


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_not_finite_is_one_sequences_fault_and_leaves_no_trace(folder: Path, dtype: str) -> None:
    runner: Any = load_runner(settings(folder, dtype=dtype, num_blocks=40))
    runner._model.embedding[90] = torch.nan
    healthy = [[5, 6, 7, 8], [9] * 30]
    expected = [finish(runner, sequence(ids, Blocks(runner, i)), 5) for i, ids in enumerate(healthy)]
    blocks = Blocks(runner)
    sick = sequence([4, 90, 6], blocks)
    well = sequence(healthy[0], blocks)
    sampled = runner.collect(runner.launch(step_of([sick, well], [3, 4])))
    assert sampled.tokens == [-1, expected[0][0]]
    # The next owner of the sick sequence's blocks sees them beyond its own end.
    heir = sequence(healthy[1], blocks)
    heir.block_table = (sick.block_table + heir.block_table)[:3]
    assert finish(runner, heir, 5) == expected[1]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_padding_reads_nobody_elses_blocks(folder: Path, dtype: str) -> None:
    """A short context beside a long one is read as far as the long one; zero times not-a-number is not zero."""
    runner: Any = load_runner(settings(folder, dtype=dtype, num_blocks=40))
    runner._model.embedding[90] = torch.nan
    texts = [[5, 6, 7, 8], list(range(9, 60))]
    expected = [finish(runner, sequence(ids, Blocks(runner, i)), 2) for i, ids in enumerate(texts)]
    blocks = Blocks(runner)
    blocks._free.remove(0)
    short, long = (sequence(ids, blocks) for ids in texts)
    step(runner, [short, long], [4, 51])
    sick = sequence([4, 90, 6], blocks)
    sick.block_table[0] = 0  # what an empty entry of a block table says
    sampled = runner.collect(runner.launch(step_of([sick, short, long], [3, 1, 1])))
    assert sampled.tokens == [-1, *(answer[1] for answer in expected)]


def test_block_size_is_free(folder: Path) -> None:
    ids = list(range(5, 75))
    texts = []
    for size in (1, 7, 16, 64):
        runner: Any = load_runner(settings(folder, dtype="float32", block_size=size))
        params = SamplingParams(max_tokens=9, temperature=0.0)
        s = Solo(list(ids), params, block_table=list(reversed(range(100 // size + 1))))
        texts.append(finish(runner, s, 9))
    assert texts == [texts[0]] * 4


def test_the_cache_is_as_large_as_allowed_and_no_larger_than_useful(folder: Path) -> None:
    assert load_runner(settings(folder, max_num_seqs=3)).num_blocks == 3 * 512 // BLOCK
    assert load_runner(settings(folder, num_blocks=7)).max_model_len == 7 * BLOCK
    with pytest.raises(ConfigError, match="--max-model-len 512 needs 32 KV cache blocks"):
        load_runner(settings(folder, num_blocks=7, max_model_len=512))


def test_a_cache_that_is_another_than_asked_for_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def notes(**more: Any) -> str:
        caplog.clear()
        load_runner(settings(folder, **more))
        return caplog.text

    defaults = {"kv_cache_mib": LoadOptions.kv_cache_mib, "max_num_seqs": 3}
    assert notes(**defaults) == ""
    told = notes(**defaults | {"kv_cache_mib": 2000})
    assert "MiB and not --kv-cache-mib 2000: 3 sequences (--max-num-seqs) of 512 tokens fill no more" in told
    told = notes(**defaults | {"num_blocks": 7})
    assert f"prompt and answer have {7 * BLOCK} tokens together, not the model's 512" in told
    assert "raise --num-blocks 7" in told
    told = notes(**defaults | {"num_blocks": 96, "kv_cache_mib": 2000, "gpu_memory_utilization": 0.5})
    assert "--kv-cache-mib 2000 changes nothing: here --num-blocks 96 says how large the KV cache is" in told
    assert "--gpu-memory-utilization 0.5 changes nothing" in told
    with pytest.raises(ConfigError, match="does not fit in memory; lower --num-blocks 2147483647"):
        load_runner(settings(folder, num_blocks=2**31 - 1))


def test_a_text_longer_than_the_model_was_made_for_is_refused(folder: Path, tmp_path: Path) -> None:
    for asked in (513, 2**24):
        with pytest.raises(ConfigError, match=f"^--max-model-len {asked} is more than the 512 tokens this model was"):
            load_runner(settings(folder, max_model_len=asked))
    assert load_runner(settings(folder, max_model_len=512)).max_model_len == 512
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    stretched = random_model(Recipe(rope=dynamic, max_position_embeddings=64))
    write_checkpoint(tmp_path, stretched)
    assert load_runner(settings(tmp_path, max_model_len=128)).max_model_len == 128
    with pytest.raises(ConfigError, match="more than the 128 tokens"):
        load_runner(settings(tmp_path, max_model_len=129))


def test_settings_that_do_not_fit_the_machine_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"float16 .* use bfloat16"):
        load_runner(settings(folder, dtype="float16"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            load_runner(settings(folder, device="cuda"))


def test_a_head_of_8_bits_is_for_the_cuda_kernels(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--lm-head-bits 8 is for CUDA; leave it out on the CPU"):
        load_runner(settings(folder, lm_head_bits=8))
    exact = LoadOptions(model_path=str(folder), dtype="float32", lm_head_bits=8)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(ConfigError, match=r"do not serve this model \(it computes in float32\); leave it out"):
        choose_backend(exact, checkpoint, config_of(checkpoint), torch.device("cuda"))


def test_an_fp8_cache_is_for_the_cuda_kernels() -> None:
    with pytest.raises(ConfigError, match="--kv-cache-dtype fp8 needs a CUDA device"):
        load_runner(LoadOptions(kv_cache_dtype="fp8", device="cpu"))
