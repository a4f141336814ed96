"""What the host does for a step on CUDA, with stand-ins for the kernels: any workload gets the texts of the CPU."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptq_api.checkpoint.checkpoint import open_checkpoint
from gptq_api.engine.core import Engine
from gptq_api.grammar.compile import regex
from gptq_api.grammar.matchers import Grammars
from gptq_api.kernels.row_groups import RowGroups
from gptq_api.model.config import read_config
from gptq_api.model.loader import load_llama
from gptq_api.runner.cpu.backend import CpuBackend
from gptq_api.runner.cuda.cache import CudaKVCache
from gptq_api.runner.cuda.forward import MAX_DRAFT_ROWS, CudaLlama
from gptq_api.runner.cuda.graphs import Buckets
from gptq_api.runner.cuda.runner import CudaRunner, _kept
from gptq_api.runner.inputs import HISTORY_START, SequenceTable, StepInputs, StepShape, num_words
from gptq_api.runner.load import load_runner
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.solo import Solo, step_of
from gptq_api.scheduler.blocks import BlockManager
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.step import Step
from gptq_api.types import Add, SamplingParams, TokenLogprobs, pack_ids, unpack_ids
from tests.support import cuda_stand_ins
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.drafting import generate, nothing
from tests.support.letters import END, letters

BASE = Recipe(max_position_embeddings=128)
RECIPES = {
    "llama": replace(BASE, act_order=True),
    "qwen3": replace(BASE, family="qwen3", tie=True, head_dim=32),
    "qwen2": replace(BASE, family="qwen2", attention_bias=True),
    "mistral": replace(BASE, family="mistral", more_config={"sliding_window": 20}, dense=("q_proj", "down_proj")),
}
BUDGET, NUM_SEQS, BLOCK = 40, 5, 8
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)


def runners(
    folder: Path, num_blocks: int, num_seqs: int = NUM_SEQS, batch_invariant: bool = False
) -> tuple[LoadedRunner, CudaRunner]:
    """(the CPU's own, the one for CUDA), float32."""
    settings = LoadOptions(
        model_path=str(folder),
        device="cpu",
        dtype="float32",
        num_threads=1,
        max_num_seqs=num_seqs,
        num_blocks=num_blocks,
        block_size=BLOCK,
    )
    reference = load_runner(settings)
    length, config = reference.max_model_len, read_config(folder)
    model, _ = load_llama(open_checkpoint(folder), config, length, CpuBackend(CPU, torch.float32))
    cache = CudaKVCache(config, reference.num_blocks, BLOCK, torch.float32, CPU)
    sizes = (BUDGET, max(num_seqs, MAX_DRAFT_ROWS), length)
    forward = CudaLlama(model, *sizes, torch.float32, batch_invariant)
    return reference, CudaRunner(forward, cache, num_seqs, BUDGET, length, 0)


def workload(runner: LoadedRunner, grammar: str = "") -> tuple[dict[int, list[int]], dict[int, str], Engine[Any]]:
    """Prompts that come bit by bit, half of them beginning alike; every third with the grammar."""
    blocks = BlockManager(runner.num_blocks, BLOCK)
    scheduler = Scheduler(blocks, NUM_SEQS, BUDGET, prompts_apart=runner.prompts_apart)
    grammars = Grammars(lambda: letters(runner.vocab_size), runner.vocab_size)
    engine: Engine[Any] = Engine(runner, scheduler, grammars=grammars)
    rng = random.Random(1)
    common = [rng.randrange(3, 90) for _ in range(24)]
    texts: dict[int, list[int]] = {}
    finished: dict[int, str] = {}

    def step() -> None:
        output = engine.step()
        if output is not None:
            for i, token in zip(unpack_ids(output.sequence_ids), unpack_ids(output.tokens), strict=True):
                texts[i].append(token)
            finished.update(output.finished)

    for i in range(12):
        texts[i] = []
        prompt = (common if i % 2 else []) + [rng.randrange(3, 90) for _ in range(rng.choice([1, 2, 9, 17, 60]))]
        params = SamplingParams(max_tokens=20 + i % 5, temperature=0)
        if grammar and i % 3 == 0:
            params = SamplingParams(max_tokens=40, temperature=0, grammar=grammar, stop_token_ids=(END,))
        engine.add(Add(i, pack_ids(prompt), (params,)))
        if i % 3 == 0:
            step()
    while engine.has_work():
        step()
    return texts, finished, engine


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("num_blocks", [64, 18], ids=["roomy", "crowded"])
def test_texts_are_those_of_the_cpu(name: str, num_blocks: int, tmp_path: Path) -> None:
    reference, runner = runners(write_checkpoint(tmp_path, random_model(RECIPES[name])), num_blocks)
    expected, *_ = workload(reference)
    texts, finished, engine = workload(runner)
    assert texts == expected and set(finished.values()) == {"length"}
    assert engine.scheduler.counters.prefix_hits > 0
    assert (engine.scheduler.counters.preemptions > 0) == (num_blocks == 18)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("num_blocks", [64, 18], ids=["roomy", "crowded"])
def test_texts_are_the_same_with_prompts_apart(name: str, num_blocks: int, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, random_model(RECIPES[name]))
    reference, runner = runners(path, num_blocks, batch_invariant=True)
    expected, *_ = workload(reference)
    texts, _, engine = workload(runner)
    assert texts == expected and runner.prompts_apart
    assert (engine.scheduler.counters.preemptions > 0) == (num_blocks == 18)


@pytest.mark.parametrize("num_blocks", [64, 18], ids=["roomy", "crowded"])
def test_grammars_are_followed_a_step_ahead(num_blocks: int, tmp_path: Path) -> None:
    reference, runner = runners(write_checkpoint(tmp_path, random_model(BASE)), num_blocks)
    plain, *_ = workload(reference)
    expected, reasons, _ = workload(reference, regex("[A-F]{3}-[0-9]{5,9}"))
    texts, finished, engine = workload(runner, regex("[A-F]{3}-[0-9]{5,9}"))
    assert texts == expected and finished == reasons
    assert (engine.scheduler.counters.preemptions > 0) == (num_blocks == 18)
    for i, tokens in texts.items():
        if i % 3:
            assert tokens == plain[i], "others notice"
        else:
            assert finished[i] == "stop" and tokens[-1] == END
            assert re.fullmatch("[A-F]{3}-[0-9]{5,9}", bytes(tokens[:-1]).decode())


def scores(runner: LoadedRunner, num_blocks: int, budget: int = BUDGET) -> dict[int, list[tuple[TokenLogprobs, int]]]:
    """Of prompts that come bit by bit, beside others that decode."""
    engine: Engine[Any] = Engine(runner, Scheduler(BlockManager(num_blocks, BLOCK), NUM_SEQS, budget))
    rng = random.Random(2)
    found: dict[int, list[tuple[TokenLogprobs, int]]] = {}

    def step() -> None:
        output = engine.step()
        for i, told in ({} if output is None else output.prompt_logprobs).items():
            entries = found.setdefault(i, [])
            assert told.first == len(entries) + 1
            entries.extend(told.unpacked())

    for i, length in enumerate([1, 2, 50, 7, 90, 33, 12, 90]):
        prompt = [rng.randrange(3, 90) for _ in range(length)]
        wanted = None if i % 4 == 3 else (0, 3, 20)[i % 3]
        engine.add(Add(i, pack_ids(prompt), (SamplingParams(max_tokens=20, temperature=0, prompt_logprobs=wanted),)))
        step()
    while engine.has_work():
        step()
    return found


@pytest.mark.parametrize("num_blocks", [64, 18], ids=["roomy", "crowded"])
def test_logprobs_of_prompts_are_those_of_the_cpu(num_blocks: int, tmp_path: Path) -> None:
    reference, runner = runners(write_checkpoint(tmp_path, random_model(RECIPES["llama"])), 64)
    expected = scores(reference, 64, budget=1000)
    found = scores(runner, num_blocks)
    assert {i: len(entries) for i, entries in found.items()} == {1: 1, 2: 49, 4: 89, 5: 32, 6: 11}
    for i, entries in found.items():
        for (told, rank), (wanted, its_rank) in zip(entries, expected[i], strict=True):
            assert told.logprob == pytest.approx(wanted.logprob, abs=1e-4) and rank == its_rank
            assert [token for token, _ in told.top] == [token for token, _ in wanted.top]
            assert [value for _, value in told.top] == pytest.approx([value for _, value in wanted.top], abs=1e-4)
            assert rank > len(told.top) or told.top[rank - 1][1] == told.logprob


def test_logits_of_a_prompt_that_are_not_finite_are_no_numbers(tmp_path: Path) -> None:
    loaded: Any = runners(write_checkpoint(tmp_path, random_model(BASE)), 64)
    for table in (loaded[0]._model.embedding, loaded[1]._model._embedding):
        table[90] = torch.nan
    for one in loaded:
        params = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=2)
        engine: Engine[Any] = Engine(one, Scheduler(BlockManager(64, BLOCK), NUM_SEQS, BUDGET))
        engine.add(Add(0, pack_ids([5, 6, 90, 7, 8]), (params,)))
        outputs = [engine.step() for _ in range(1 + one.lookahead)]
        assert outputs[-1] is not None and outputs[-1].finished == {0: "error"}
        told = [entry.logprob for entry, _ in outputs[-1].prompt_logprobs[0].unpacked()]
        assert len(told) == 4 and all(math.isnan(logprob) for logprob in told[2:])


def test_a_device_without_memory_costs_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, runner = runners(write_checkpoint(tmp_path, random_model(BASE)), 64)
    expected, *_ = workload(reference)
    run, calls = runner._graphs.run, iter(range(10**6))

    def fails_often(shape: StepShape, capture: bool = True) -> torch.Tensor:
        if next(calls) % 7 == 3 and shape.num_rows > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand so on")
        return run(shape, capture)

    monkeypatch.setattr(runner._graphs, "run", fails_often)
    texts, finished, _ = workload(runner)
    assert texts == expected and set(finished.values()) == {"length"}


def test_not_finite_is_one_sequences_fault(tmp_path: Path) -> None:
    _, runner = runners(write_checkpoint(tmp_path, random_model(BASE)), 64)
    runner._model._embedding[90] = torch.nan
    params = SamplingParams(max_tokens=1, temperature=0)
    sick = Solo([5, 90, 7] * 4, params, block_table=[3, 9], seat=2)
    well = Solo([5, 6, 7], params, block_table=[4], seat=0)
    sampled = runner.collect(runner.launch(step_of([sick, well], [12, 3])))
    assert sampled.tokens[0] == -1 and sampled.tokens[1] >= 0
    assert all(bool(layer.isfinite().all()) for layer in runner._cache.layers)
    assert all(bool(layer[3].any() and layer[4].any()) for layer in runner._cache.layers)


def test_more_places_for_sequences_than_for_rows(tmp_path: Path) -> None:
    """Both are padded, and not alike."""
    reference, runner = runners(write_checkpoint(tmp_path, random_model(BASE)), 64, num_seqs=30)
    params = SamplingParams(max_tokens=1, temperature=0)
    step = step_of([Solo([5 + i], params, block_table=[i], seat=i) for i in range(10)], [1] * 10)
    assert runner.collect(runner.launch(step)).tokens == reference.collect(reference.launch(step)).tokens


def test_a_step_is_padded_with_what_kernels_skip() -> None:
    table = SequenceTable(4, 6, 4)
    params = SamplingParams(max_tokens=1)
    first = Solo(list(range(9)), params, block_table=[7, 8, 9], seat=3)
    second = Solo([1, 2], params, block_table=[5], seat=1, num_computed_tokens=1)
    columns = table.take_in(step_of([first, second], [9, 1]))
    shape = StepShape(12, 3, 5, 4)
    arrays = StepInputs.over(np.full(num_words(shape), 99, np.int32), shape)
    table.write(columns, 4, arrays)
    assert arrays.row_seat.tolist() == [3] * 9 + [1, 0, 0]
    assert arrays.positions.tolist() == [*range(9), 1, -1, -1]
    assert arrays.slot_mapping.tolist() == [28, 29, 30, 31, 32, 33, 34, 35, 36, 21, -1, -1]
    assert arrays.query_start.tolist() == [0, 9, 10, 10]
    assert arrays.context_lens.tolist() == [9, 2, 0]
    assert arrays.last_rows.tolist() == [8, 9, 0]
    assert arrays.tiles.tolist() == [[0, 0], [0, 4], [0, 8], [-1, -1]]
    assert arrays.block_tables.tolist() == [[7, 8, 9, 0, 0], [5, 0, 0, 0, 0], [0] * 5]


@pytest.mark.parametrize(("num_seqs", "budget", "max_blocks"), [(256, 2048, 128), (3, 16, 7), (700, 8192, 2048)])
def test_every_step_fits_its_bucket(num_seqs: int, budget: int, max_blocks: int) -> None:
    buckets = Buckets(num_seqs, budget, max_blocks, 128)
    for num in range(1, num_seqs + 1):
        shape = buckets.decode_shape(num, max_blocks)
        assert num <= shape.num_rows == shape.num_sequences <= num_seqs and shape.num_tiles == 0
        assert shape.num_rows <= max(8, num * 2)
    for rows in range(1, budget + 1, 7):
        # Pairs of rows beside one long prompt.
        for pairs in {0, min(rows // 2, num_seqs - 1), min(rows // 4, num_seqs - 1)}:
            rest = rows - 2 * pairs
            tiles = max(1, pairs + (-(-rest // 128) if rest > 1 else 0))
            step = (rows, pairs + (rest > 0), tiles, max_blocks)
            mixed = buckets.mixed_shape(*step)
            assert (mixed is None) == (rows > 512)
            assert mixed is None or all(have >= need for have, need in zip(mixed, step_shape(*step), strict=True))


def step_shape(rows: int, sequences: int, tiles: int, blocks: int) -> StepShape:
    return StepShape(rows, sequences, blocks, tiles)


def drafted_step() -> Step:
    """Three sequences of 9, 4 and 17 tokens; the first has two drafts, the last three."""
    rows = [3, 1, 4]
    return Step([2, 0, 1], [8, 3, 16], rows, rows, [], [], drafts={0: [50, 51], 2: [60, 61, 62]})


def test_each_row_of_a_step_with_drafts_counts_as_a_sequence() -> None:
    table = SequenceTable(4, 6, 4, groups=RowGroups(2))
    params = SamplingParams(max_tokens=1)
    solos = [
        Solo(list(range(length)), params, block_table=blocks, seat=seat)
        for seat, length, blocks in ((2, 9, [7, 8, 9]), (0, 4, [3, 2]), (1, 17, [10, 11, 12, 13, 14]))
    ]
    table.take_in(step_of(solos, [8, 3, 16]))
    rows = table.take_in_rows(drafted_step(), max_model_len=100)
    shape = Buckets(4, 64, 6, 4, 8).draft_shape(len(rows.seats), 5)
    assert shape.drafted and shape.num_rows == shape.num_sequences == 8
    arrays = StepInputs.over(np.full(num_words(shape), 99, np.int32), shape)
    table.write_rows(rows, arrays)
    assert arrays.row_seat.tolist() == [2, 2, 2, 0, 1, 1, 1, 1]
    assert arrays.positions.tolist() == [8, 9, 10, 3, 16, 17, 18, 19]
    assert arrays.context_lens.tolist() == [9, 10, 11, 4, 17, 18, 19, 20]
    assert arrays.slot_mapping.tolist() == [36, 37, 38, 15, 56, 57, 58, 59]
    assert arrays.query_start.tolist() == list(range(9))
    assert arrays.last_rows.tolist() == list(range(8))
    assert arrays.block_tables[:, :5].tolist() == [[7, 8, 9, 0, 0]] * 3 + [[3, 2, 0, 0, 0]] + [[10, 11, 12, 13, 14]] * 4
    assert arrays.draft_tokens.tolist() == [0, 50, 51, 0, 0, 60, 61, 62]
    places = [0, 209, 210, 0, 0, 117, 118, 119]
    assert arrays.draft_places.view(np.int64)[:, 0].tolist() == [HISTORY_START + i if i else 0 for i in places]
    assert arrays.groups.tolist() == [[2, 2], [0, 0], [1, 3], [1, 1], [2, 2], [0, 0], [2, 4], [0, 0]]


def test_padding_of_a_step_with_drafts_is_what_kernels_skip() -> None:
    table = SequenceTable(4, 6, 4)
    table.take_in(step_of([Solo([5] * 9, SamplingParams(max_tokens=1), block_table=[7, 8, 9], seat=2)], [9]))
    rows = table.take_in_rows(Step([2], [9], [2], [2], [], [], drafts={0: [50]}), max_model_len=100)
    shape = StepShape(4, 4, 3, 0, drafted=True)
    arrays = StepInputs.over(np.full(num_words(shape), 99, np.int32), shape)
    table.write_rows(rows, arrays)
    assert arrays.row_seat.tolist() == [2, 2, 0, 0]
    assert arrays.positions.tolist() == [9, 10, -1, -1]
    assert arrays.slot_mapping.tolist() == [37, 38, -1, -1]
    assert arrays.query_start.tolist() == [0, 1, 2, 2, 2]
    assert arrays.context_lens.tolist() == [10, 11, 0, 0]
    assert arrays.last_rows.tolist() == [0, 1, 0, 0]
    assert arrays.block_tables.tolist() == [[7, 8, 9]] * 2 + [[0] * 3] * 2
    assert arrays.draft_tokens.tolist() == [0, 50, 0, 0]
    assert arrays.draft_places.view(np.int64)[:, 0].tolist() == [0, HISTORY_START + 210, 0, 0]
    assert arrays.groups.tolist() == [[1, 1], [1, 2], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("drawn", "num_tokens", "rows"),
    [
        ([50, 51, 99, 1, 60, 61, 62, 98], [3, 1, 4], [0, 1, 2, 3, 4, 5, 6, 7]),
        ([99, 51, 98, 1, 60, 97, 62, 96], [1, 1, 2], [0, 3, 4, 5]),
        ([50, 99, 98, -1, -1, 61, 62, 98], [2, 1, 1], [0, 1, 3, 4]),
    ],
)
def test_rows_count_while_the_drafts_are_right(drawn: list[int], num_tokens: list[int], rows: list[int]) -> None:
    assert _kept(drafted_step(), drawn) == (num_tokens, rows, list(range(8)))


@pytest.mark.parametrize("grammars", [("",), ("", "of all ids"), ("", "", "of all ids", "")])
def test_drafts_change_no_text(grammars: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaLlama, "max_draft_rows", MAX_DRAFT_ROWS)
    _, runner = runners(write_checkpoint(tmp_path, random_model(BASE)), 80)
    params = [SamplingParams(max_tokens=40, temperature=0, grammar=grammar) for grammar in grammars]
    prompts = [[3 + i, 50, 20 - i] * (1 + i) for i in range(len(grammars))]
    plain = generate(runner, prompts, params, nothing)

    def now_and_then_right(sequence: int, output: list[int]) -> list[int]:
        right = plain[sequence].output[len(output) : len(output) + len(output) % 5]
        return [*right, 5] if len(output) % 3 else right

    drafted = generate(runner, prompts, params, now_and_then_right)
    assert [text.output for text in drafted] == [text.output for text in plain]
