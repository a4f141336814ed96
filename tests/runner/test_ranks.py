"""Several ranks of one model: the bits of one, on the CPU, where each rank is a thread."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import torch

from gptq_api.checkpoint.checkpoint import CheckpointError
from gptq_api.errors import ConfigError
from gptq_api.model.config import read_config
from gptq_api.model.modules import modules
from gptq_api.model.shard import Shard, outputs, refusal
from gptq_api.runner import ranks
from gptq_api.runner.load import load_runner
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.parallel import ParallelRunner
from gptq_api.runner.ranks import RankError, RankGroup
from gptq_api.runner.solo import Solo, lone_step, step_of
from gptq_api.scheduler.drafts import DraftSource, PastAnswers, TextDrafts
from gptq_api.scheduler.sequence import Sequence
from gptq_api.step import DeviceMemoryError, Sampled, Step
from gptq_api.types import SamplingParams
from tests.runner.cpu.test_equal_bits import COMPANY, NUM_BLOCKS, answers, requests
from tests.support import draft_models as drafting
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.draft_sources import Fickle, Garbage, Truth
from tests.support.eagle_heads import HeadRecipe, random_head, write_head
from tests.support.server import Server
from tests.support.soak import cycle, num_blocks

BASE = Recipe(num_heads=4, num_kv_heads=4, vocab_size=101)
"""whose head does not divide evenly"""
RECIPES = {
    "plain": BASE,
    "act-order": replace(BASE, act_order=True, sym=False),
    "an act-order of its own each": replace(BASE, act_order=True, own_order=("up_proj", "k_proj")),
    "tied": replace(BASE, tie=True),
    "quantized head": replace(BASE, quantize_head=True, vocab_size=112),
    "biases everywhere": replace(BASE, attention_bias=True, mlp_bias=True, act_order=True),
    "qwen2": replace(BASE, family="qwen2", attention_bias=True),
    "qwen3": replace(BASE, family="qwen3", head_dim=32, tie=True),
    "unquantized o and down": replace(BASE, dense=("o_proj", "down_proj")),
    "mixed bits": replace(BASE, mixed_bits={"down_proj": 8, "q_proj": 3, "up_proj": 8}),
    "uneven": replace(BASE, intermediate_size=176),
}
BLOCK = 7
"""tokens: a size for which one rank computes in torch as well, in the same order"""


def load(folder: Path | str, size: int, **settings: Any) -> LoadedRunner:
    defaults: dict[str, Any] = {"device": "cpu", "num_blocks": 40, "block_size": BLOCK, "max_num_seqs": 8}
    defaults |= {"max_model_len": 120}
    return load_runner(LoadOptions(model_path=str(folder), tensor_parallel_size=size, **{**defaults, **settings}))


def logits(runner: LoadedRunner, rows: int) -> torch.Tensor:
    solo = Solo(list(range(3, 3 + rows)), SamplingParams(max_tokens=1), list(range(20)))
    found, _ = runner.logits(step_of([solo], [rows]), every_row=True)
    return found


@pytest.mark.parametrize("dtype", ["float32", "auto"])
@pytest.mark.parametrize("name", RECIPES)
def test_logits_have_the_bits_of_one_rank(name: str, dtype: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, random_model(RECIPES[name]))
    whole = load(folder, 1, dtype=dtype)
    for size in (2, 4):
        parts = load(folder, size, dtype=dtype)
        for rows in (1, 9, 40):
            assert torch.equal(logits(parts, rows), logits(whole, rows)), (size, rows)
        assert parts.num_blocks == whole.num_blocks and parts.vocab_size == whole.vocab_size


SIZES: dict[str, Any] = {"num_blocks": NUM_BLOCKS * 3, "max_num_seqs": COMPANY, "max_model_len": None}


def test_the_demo_and_its_texts_greedy_and_sampled() -> None:
    """Through the engine, alone and preempted behind a cached prefix."""
    expected, _ = answers(load("demo", 1, **SIZES), range(8), budget=200)
    runner = load("demo", 2, **SIZES)
    for ways in ({}, {"preempts": True, "caching": True, "times": 2}):
        found, _ = answers(runner, range(8), budget=200, **ways)  # type: ignore[arg-type]
        assert found == expected


def test_what_texts_say_may_follow_is_checked_by_all_ranks() -> None:
    """Drafts that are right, wrong, both, and those of the texts themselves."""
    runner, asked = load("demo", 2, **SIZES), requests(load("demo", 1, **SIZES).vocab_size)
    expected, _ = answers(load("demo", 1, **SIZES), range(4), budget=200)

    def following(seq: Sequence, tokens: list[int]) -> int:
        place, text = len(tokens) - seq.num_prompt_tokens, expected[seq.sequence_id].tokens
        return text[place] if place < len(text) and tokens[: seq.num_prompt_tokens] == asked[seq.sequence_id][0] else -1

    truth = Truth(following)
    sources: list[DraftSource] = [truth, Fickle(truth, Garbage(runner.vocab_size)), TextDrafts(PastAnswers())]
    for source in sources:
        found, counters = answers(runner, range(4), budget=200, source=source, times=2)
        assert found == expected and counters.draft_tokens > 0 and counters.accepted_tokens > 0
        if source is truth:
            assert counters.accepted_tokens == counters.draft_tokens


SERVED = replace(BASE, num_layers=4, vocab_size=96, act_order=True)
HEAD = HeadRecipe(SERVED, more_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 3]})
"""in a model of its usual depth it would read what goes into the third, a middle and a late layer"""
SHALLOW = replace(SERVED, num_layers=3)
DRAFTS = {"itself": None, "another, dense": replace(BASE, vocab_size=96, seed=1, num_layers=1, dense=("_proj",))}
ENGINE: dict[str, Any] = {"num_blocks": drafting.NUM_BLOCKS, "max_model_len": None}


def draft_folder(name: str, served: Path, path: Path) -> Path:
    if name == "a head":
        return write_head(path, random_head(HEAD))
    recipe = DRAFTS[name]
    return served if recipe is None else write_checkpoint(path, random_model(recipe))


@pytest.mark.parametrize("how", ["plain", "preempted", "again"])
@pytest.mark.parametrize("draft", ["itself", "another, dense", "a head"])
def test_with_a_draft_model_beside_them_no_bit_changes(draft: str, how: str, tmp_path: Path) -> None:
    """Greedy and sampled, with penalties and log-probabilities."""
    served = write_checkpoint(tmp_path / "served", random_model(SERVED if draft == "a head" else SHALLOW))
    beside = draft_folder(draft, served, tmp_path / "draft")
    ways: dict[str, Any] = {"preempts": how == "preempted", "times": 2 if how == "again" else 1}
    plain, _, num_plain = drafting.answers(load(served, 1, **ENGINE), drafting.KINDS, **ways)
    for size in (2, 4) if how == "plain" else (2,):
        runner = load(served, size, draft_model=str(beside), **ENGINE)
        drafted, scheduler, num_steps = drafting.answers(runner, drafting.KINDS, **ways)
        assert drafted == plain
        assert scheduler.counters.draft_tokens > 0
        if draft == "itself" and how == "plain":
            assert scheduler.counters.accepted_tokens == scheduler.counters.draft_tokens
            assert num_steps < 0.6 * num_plain
        name = beside.name
        assert f"; draft model {name} beside rank 0: " in runner.description


def test_caches_of_ranks_and_a_draft_model_share_the_memory_for_one(tmp_path: Path) -> None:
    served = write_checkpoint(tmp_path / "served", random_model(SERVED))
    head = write_head(tmp_path / "head", random_head(HEAD))
    settings: dict[str, Any] = {"num_blocks": None, "kv_cache_mib": 2, "max_num_seqs": 64, "max_model_len": None}
    for draft in (served, head):
        alone, both = (load(served, 2, draft_model=name, **settings) for name in (None, str(draft)))
        one = load(served, 1, draft_model=str(draft), **settings)
        drafter: Any = both.drafter
        assert drafter._runner.num_blocks == both.num_blocks == one.num_blocks < alone.num_blocks
        features = drafter._runner._model._store.num_bytes if draft == head else 0
        assert 0.9 * 2**21 < both.cache_bytes + drafter._runner.cache_bytes + features <= 2**21 + 2 * 64


def test_a_draft_model_that_cannot_be_loaded_is_said_by_name(tmp_path: Path) -> None:
    """Nobody waits for a rank that found it out."""
    served = write_checkpoint(tmp_path / "served", random_model(SERVED))
    model = random_model(SERVED)
    tensors = model.tensors()
    tensors["model.norm.weight"][3] = torch.nan
    broken = write_checkpoint(tmp_path / "broken", model, tensors=tensors)
    with pytest.raises(ConfigError, match=r"--draft-model .*: .*tensor model\.norm\.weight holds NaN"):
        load(served, 2, draft_model=str(broken))
    with pytest.raises(ConfigError, match=r"--draft-model .*nowhere does not exist"):
        load(served, 2, draft_model=str(tmp_path / "nowhere"))


def test_every_output_has_one_rank(tmp_path: Path) -> None:
    config = read_config(write_checkpoint(tmp_path, random_model(replace(BASE, intermediate_size=176))))
    for size in (2, 3, 4):
        for module in modules(config):
            if module.joins == "qkv" and size == 3:
                continue
            parts = [outputs(config, module, Shard(rank, size)) for rank in range(size)]
            assert sorted(i for part in parts for each in part for i in each) == list(range(module.out_features))
    assert [len(Shard(rank, 4).of(11008)) for rank in range(4)] == [2752] * 4
    assert [len(Shard(rank, 3).of(4096)) for rank in range(3)] == [1360, 1360, 1376]


def test_what_cannot_be_shared_is_said(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, random_model(Recipe(num_heads=6, num_kv_heads=2, hidden_size=96)))
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size 3: 6 attention heads and 2 key-value.*1, 2 GPUs"):
        load(folder, 3)
    with pytest.raises(ConfigError, match=r"--draft-model demo has a vocabulary of \d+, the served model of 96"):
        load(folder, 2, draft_model="demo")
    small = replace(BASE, hidden_size=32, num_heads=8, num_kv_heads=8, intermediate_size=96)
    config = read_config(write_checkpoint(tmp_path / "small", random_model(small)))
    assert refusal(config, 4) == "32 outputs are less than 16 for each of 4 ranks"


def test_what_one_rank_alone_reads_is_told(tmp_path: Path) -> None:
    model = random_model(BASE)
    tensors = model.tensors()
    tensors["model.layers.1.mlp.up_proj.scales"][0, -1] = torch.nan
    folder = write_checkpoint(tmp_path / "nan", model, tensors=tensors)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor model\.layers\.1\.mlp\.up_proj\.scales holds NaN"
    ):
        load(folder, 4)


def test_a_warning_of_one_rank_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tied = random_model(replace(BASE, tie=True))
    tensors = tied.tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1] += 1
    load(write_checkpoint(tmp_path, tied, tensors=tensors), 4)
    assert caplog.text.count("lm_head.weight is not used: config.json ties the embedding to the head") == 1


@pytest.mark.parametrize("size", [2, 4])
def test_whatever_rank_is_late_every_step_has_its_bits(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand steps of two ranks, each delayed at random before some of its exchanges."""
    exchange, delays = RankGroup.exchange, [random.Random(rank) for rank in range(size)]

    def late(group: RankGroup, rank: int, value: Any) -> list[Any]:
        if delays[rank].random() < 0.02:
            time.sleep(delays[rank].random() * 1e-3)
        return exchange(group, rank, value)

    steps = cycle(50, 101, BLOCK)
    folder = write_checkpoint(tmp_path, random_model(replace(BASE, act_order=True)))
    whole, parts = (load(folder, num, num_blocks=num_blocks(50, BLOCK)) for num in (1, size))
    assert isinstance(parts, ParallelRunner)
    expected = with_logits(whole, [whole], steps)
    monkeypatch.setattr(RankGroup, "exchange", late)
    for _ in range(40 // size):
        for i, (tokens, logits) in enumerate(with_logits(parts, parts.ranks, steps)):
            assert tokens == expected[i][0], i
            assert len(logits) == size and all(torch.equal(one, expected[i][1][0]) for one in logits), i


def with_logits(
    runner: LoadedRunner, ranks: list[LoadedRunner], steps: list[Step]
) -> list[tuple[list[int], list[torch.Tensor]]]:
    """What each step sampled, and the logits that it sampled from on each rank."""
    kept: list[torch.Tensor | None] = [None] * len(ranks)
    originals = [rank._model.logits for rank in cast("list[Any]", ranks)]

    def keeping(i: int, x: torch.Tensor, rows: list[int]) -> torch.Tensor:
        logits: torch.Tensor = originals[i](x, rows)
        kept[i] = logits.clone()
        return logits

    found = []
    for i, rank in enumerate(cast("list[Any]", ranks)):
        rank._model.logits = partial(keeping, i)
    for step in steps:
        tokens = runner.collect(runner.launch(step)).tokens
        found.append((tokens, [each for each in kept if each is not None]))
    for rank, original in zip(cast("list[Any]", ranks), originals, strict=True):
        rank._model.logits = original
    return found


def test_ranks_that_differ_end_the_engine() -> None:
    runner = load("demo", 2)
    assert isinstance(runner, ParallelRunner)
    launched = runner.launch(lone_step(5, 3, runner.block_size))
    (token,) = launched[0].sampled.tokens
    launched[1].sampled = Sampled([1], [token + 1])
    with pytest.raises(RankError, match=rf"rank 1 sampled \[{token + 1}\], rank 0 \[{token}\]: their memory differs"):
        runner.collect(launched)


def test_a_rank_that_fails_wakes_those_that_wait_for_it() -> None:
    runner = load("demo", 2)
    assert isinstance(runner, ParallelRunner)
    other: Any = runner.ranks[1]
    other._model.weights.layers[3].down.weight = None
    with pytest.raises(AttributeError, match="matmul"):
        runner.launch(lone_step(5, 3, runner.block_size))
    with pytest.raises(RankError, match=r"a rank stopped before: .*matmul"):
        runner.launch(lone_step(5, 3, runner.block_size))


def test_a_rank_without_memory_ends_the_step_of_all() -> None:
    runner = load("demo", 2)
    assert isinstance(runner, ParallelRunner)
    other: Any = runner.ranks[1]

    def forward(*_: Any) -> None:
        raise torch.OutOfMemoryError("2 GiB are not there")

    other._model.forward = forward
    with pytest.raises(DeviceMemoryError, match="2 GiB are not there"):
        runner.launch(lone_step(5, 3, runner.block_size))


DRAFTED = "vllm:spec_decode_num_draft_tokens_total"


QUESTION: dict[str, Any] = {
    "ignore_eos": True,
    "messages": [{"role": "user", "content": "What is GPTQ?"}],
    "max_tokens": 160,
}
QUESTIONS = [{**QUESTION, "temperature": 0}, {**QUESTION, "temperature": 1, "seed": 5}]


def served_texts(flags: tuple[str, ...], predicted: list[str] | None) -> list[str]:
    found = []
    with Server("--block-size", str(BLOCK), "--num-blocks", "200", *flags) as server:
        for i, asked in enumerate(QUESTIONS):
            if predicted:
                asked = {**asked, "prediction": {"type": "content", "content": predicted[i]}}
            answer = httpx.post(f"{server.url}/chat/completions", json=asked, timeout=60).json()
            found.append(answer["choices"][0]["message"]["content"])
        assert (server.metric(DRAFTED) > 0) == ("--speculate" in flags)
    return found


@pytest.fixture(scope="module")
def texts_of_one() -> list[str]:
    return served_texts((), None)


@pytest.mark.parametrize(
    "flags",
    [
        ("--tensor-parallel-size", "2"),
        ("--num-gpus", "2", "--speculate", "ngram"),
        ("--num-gpus", "2", "--speculate", "ngram", "--draft-model", "demo"),
    ],
    ids=["", "prediction", "draft model"],
)
def test_a_server_with_two_ranks_answers_as_one_does(flags: tuple[str, ...], texts_of_one: list[str]) -> None:
    predicted = None if "--draft-model" in flags else texts_of_one
    assert served_texts(flags, predicted) == texts_of_one and "GPTQ" in texts_of_one[0]


def test_a_rank_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "STALL_S", 0.2)
    group, held = RankGroup(2), threading.Event()

    def work(rank: int) -> None:
        if rank == 0:
            try:
                group.ranks[0].meet()
            finally:
                held.set()
        else:
            held.wait(30)

    with pytest.raises(RankError, match=r"has not come for 0 s|another rank failed"):
        group.run(work)
