"""The model on a CUDA device: the answers of the CPU, the logits of float32, the same text in any company."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from gptq_api.demo import DEMO_PATH
from gptq_api.engine.core import Engine
from gptq_api.grammar.compile import json_schema
from gptq_api.kernels import gemm
from gptq_api.runner.cpu.runner import CpuRunner
from gptq_api.runner.cuda import graphs
from gptq_api.runner.cuda.runner import CudaRunner
from gptq_api.runner.load import load_runner
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.solo import Solo, step_of
from gptq_api.scheduler.blocks import BlockManager
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.text.chat_template import load_chat_template
from gptq_api.text.tokenizer import load_tokenizer
from gptq_api.types import Add, SamplingParams, TokenLogprobs, pack_ids, unpack_ids
from tests.engine.test_grammars import SCHEMA, World, crowd
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.server import Server

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available"),
]
QUESTIONS: list[dict[str, Any]] = json.loads((Path(__file__).parents[2] / "demo_questions.json").read_text())
GREEDY: dict[str, Any] = {"max_tokens": 64, "temperature": 0.0}


def load(model_path: Path | str, **settings: Any) -> LoadedRunner:
    defaults = {"device": "cuda", "num_blocks": 2000, "max_num_seqs": 64, "num_threads": 1}
    return load_runner(LoadOptions(model_path=str(model_path), **{**defaults, **settings}))


class Outcome:
    """What an engine gave to each of its prompts."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[TokenLogprobs]] = {}
        self.scores: dict[int, list[tuple[TokenLogprobs, int]]] = {}
        self.finished: dict[int, str] = {}
        self.num_preemptions = self.num_prefix_hits = 0


def run(
    runner: LoadedRunner,
    prompts: list[list[int]],
    params: list[dict[str, Any]] | None = None,
    *,
    num_blocks: int | None = None,
    max_num_seqs: int = 64,
    budget: int = 2048,
    caching: bool = True,
    steps_between: int = 0,
) -> Outcome:
    """All prompts through an engine; `steps_between` steps pass before the next prompt comes."""
    blocks = BlockManager(num_blocks or runner.num_blocks, runner.block_size)
    engine: Engine[Any] = Engine(runner, Scheduler(blocks, max_num_seqs, budget, caching))
    outcome = Outcome()

    def step() -> None:
        output = engine.step()
        if output is None:
            return
        columns = zip(unpack_ids(output.sequence_ids), unpack_ids(output.tokens), strict=True)
        for entry, (i, token) in enumerate(columns):
            outcome.tokens[i].append(token)
            if entry in output.logprobs:
                outcome.logprobs.setdefault(i, []).append(output.logprobs[entry])
        for i, told in output.prompt_logprobs.items():
            entries = outcome.scores.setdefault(i, [])
            assert told.first == len(entries) + 1
            entries.extend(told.unpacked())
        outcome.finished |= output.finished

    for i, prompt in enumerate(prompts):
        outcome.tokens[i] = []
        engine.add(Add(i, pack_ids(prompt), (SamplingParams(**(GREEDY if params is None else params[i])),)))
        for _ in range(steps_between):
            step()
    while engine.has_work():
        step()
    outcome.num_preemptions = engine.scheduler.counters.preemptions
    outcome.num_prefix_hits = engine.scheduler.counters.prefix_hits
    return outcome


@functools.cache
def questions() -> list[list[int]]:
    template = load_chat_template(DEMO_PATH, load_tokenizer(DEMO_PATH))
    return [template.render([{"role": "user", "content": entry["question"]}]) for entry in QUESTIONS]


@functools.cache
def cpu_answers() -> dict[int, list[int]]:
    """The first 64 tokens of every answer on the CPU, in float32: one by one."""
    runner = load_runner(LoadOptions(device="cpu", dtype="float32", num_threads=1, max_num_seqs=8))
    eos = {**GREEDY, "stop_token_ids": runner.eos_token_ids}
    return run(runner, questions(), [eos] * len(questions()), max_num_seqs=8).tokens


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def demo(request: pytest.FixtureRequest) -> Iterator[LoadedRunner]:
    yield load("demo", dtype=request.param)


def agreement(one: dict[int, list[int]], other: dict[int, list[int]]) -> float:
    assert one.keys() == other.keys()
    return sum(one[i] == other[i] for i in one) / len(one)


def test_the_readmes_questions_get_the_answers_of_the_cpu(demo: LoadedRunner) -> None:
    assert isinstance(demo, CudaRunner) and demo.device.startswith("cuda")
    eos = {**GREEDY, "stop_token_ids": demo.eos_token_ids}
    together = run(demo, questions(), [eos] * len(QUESTIONS))
    assert together.tokens == cpu_answers()
    one_by_one = run(demo, questions(), [eos] * len(QUESTIONS), max_num_seqs=1)
    assert one_by_one.tokens == cpu_answers()


def test_preemption_chunks_and_prefix_hits_change_no_answer(demo: LoadedRunner) -> None:
    eos = {**GREEDY, "stop_token_ids": demo.eos_token_ids}
    twice = questions() + questions()
    small_blocks = load("demo", dtype=demo.dtype, block_size=8, num_blocks=80)
    crowded = run(small_blocks, twice, [eos] * len(twice), budget=48)
    assert crowded.num_preemptions > 0 and crowded.num_prefix_hits > 0
    assert [crowded.tokens[i] for i in range(len(twice))] == [
        cpu_answers()[i % len(QUESTIONS)] for i in range(len(twice))
    ]


def test_the_server_answers_from_the_device() -> None:
    with Server("--device", "cuda") as server:
        for entry in QUESTIONS[:3]:
            reply = server.chat(entry["question"], temperature=0).json()
            assert reply["choices"][0]["message"]["content"] == entry["exact"]
        assert "cuda int4" in server.log()


def rambling(num: int, seed: int = 1) -> list[list[int]]:
    """Prompts of nonsense, about which the model is never sure."""
    rng = random.Random(seed)
    return [[rng.randrange(10, 2048) for _ in range(rng.choice([1, 3, 17, 60, 130]))] for _ in range(num)]


def test_overlap_changes_nothing(demo: LoadedRunner) -> None:
    """All prompts fit into one step, so both ways every step has the same batch: bit for bit."""
    prompts = rambling(16)
    overlapped = run(demo, prompts)
    demo.lookahead = 0
    try:
        in_turn = run(demo, prompts)
    finally:
        demo.lookahead = 1
    assert overlapped.tokens == in_turn.tokens


def test_graphs_that_make_room_for_others_change_nothing(demo: LoadedRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of many shapes, and room for the graphs of two of them."""
    prompts = rambling(24, seed=3)
    roomy = run(demo, prompts, steps_between=2, budget=64)
    monkeypatch.setattr(graphs, "_MOST", 2)
    runner = load("demo", dtype=demo.dtype)
    assert isinstance(runner, CudaRunner)
    at_start = runner.num_graphs
    for _ in range(3):  # kernel by kernel, captured, captured anew
        assert run(runner, prompts, steps_between=2, budget=64).tokens == roomy.tokens
    assert at_start < runner.num_graphs <= at_start + 2
    assert runner._graphs._num_weighed > runner.num_graphs
    assert runner._graphs.num_bytes < graphs.GRAPH_BYTES
    print(runner._graphs)


def test_company_changes_little(demo: LoadedRunner) -> None:
    """Products of small and large batches round differently, and nonsense has many near ties: most texts agree."""
    prompts = rambling(64, seed=2)
    alone = run(demo, prompts, max_num_seqs=1, caching=False)
    together = run(demo, prompts, caching=False)
    share = agreement(alone.tokens, together.tokens)
    print(f"{demo.dtype}: {share:.0%} of {len(prompts)} rambling texts of 64 tokens are the same alone and together")
    assert share > 0.5


def test_a_seed_gives_the_same_draws_with_every_parameter(demo: LoadedRunner) -> None:
    params: list[dict[str, Any]] = [
        {"temperature": 0.8, "seed": 7},
        {"temperature": 1.0, "seed": 8, "top_p": 0.7},
        {"temperature": 1.2, "seed": 9, "top_k": 5, "repetition_penalty": 1.2},
        {"temperature": 0.9, "seed": 2**63 + 5, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 0.0, "logit_bias": {77: 100.0}, "top_logprobs": 3},
        {"temperature": 0.7, "seed": 11, "min_tokens": 20, "stop_token_ids": tuple(range(1024)), "top_logprobs": 0},
    ]
    params = [{"max_tokens": 24, **p} for p in params]
    prompts = rambling(6, seed=3)
    first, second = run(demo, prompts, params), run(demo, prompts, params)
    assert first.tokens == second.tokens and first.logprobs == second.logprobs
    assert first.tokens[4] == [77] * 24
    assert len(first.tokens[5]) > 20 or (first.finished[5] == "stop" and len(first.tokens[5]) == 21)
    assert all(len(found.top) == 3 and found.logprob < 0 for found in first.logprobs[4])
    cpu = run(load_runner(LoadOptions(device="cpu", dtype="float32", num_threads=1)), prompts, params)
    found, expected = first.logprobs[4][0], cpu.logprobs[4][0]
    assert found.logprob == pytest.approx(expected.logprob, abs=0.1)
    assert found.top[0][1] == pytest.approx(expected.top[0][1], abs=0.1)


FAST = Recipe(
    vocab_size=512, hidden_size=256, intermediate_size=448, num_heads=4, num_kv_heads=2, head_dim=64, act_order=True
)
FAMILIES = {
    "act-order": FAST,
    "asymmetric, groups of 128": replace(FAST, sym=False, group_size=128, act_order=False),
    "one group": replace(FAST, group_size=-1, act_order=False),
    "heads of 128": replace(FAST, head_dim=128),
    "multi-query": replace(FAST, num_kv_heads=1),
    "mistral": replace(FAST, family="mistral", more_config={"sliding_window": 40}),
    "qwen2": replace(FAST, family="qwen2", attention_bias=True),
    "qwen3": replace(FAST, family="qwen3", tie=True),
    "biases": replace(FAST, attention_bias=True, mlp_bias=True),
    "k ordered unlike q and v": replace(FAST, own_order=("k_proj",)),
    "mixed bits": replace(FAST, mixed_bits={"v_proj": 8, "down_proj": 2}),
    "3 bits": replace(FAST, bits=3),
    "8 bits": replace(FAST, bits=8, group_size=128, quantize_head=True),
    "8 bits, asymmetric, biases": replace(FAST, bits=8, act_order=False, sym=False, attention_bias=True, mlp_bias=True),
    "8 bits, k ordered unlike q and v": replace(FAST, bits=8, sym=False, own_order=("k_proj",), tie=True),
    "quantized head": replace(FAST, quantize_head=True),
    "some left dense": replace(FAST, dense=("q_proj", "down_proj")),
}
WIDE = Recipe(
    vocab_size=512,
    hidden_size=1024,
    intermediate_size=2816,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    group_size=128,
    max_position_embeddings=512,
)
IDS = torch.randint(3, 512, (150,), generator=torch.Generator().manual_seed(5)).tolist()


def every_logit(runner: LoadedRunner, num_at_once: int) -> torch.Tensor:
    """Of all of IDS, in chunks: float32 [len(IDS), V] on the CPU."""
    solo = Solo(list(IDS), SamplingParams(max_tokens=1), block_table=list(range(3, 3 + len(IDS) // 16 + 1)))
    parts = []
    while solo.num_pending_tokens:
        num = min(num_at_once, solo.num_pending_tokens)
        parts.append(runner.logits(step_of([solo], [num]), every_row=True)[0].cpu())
    return torch.cat(parts)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_near_those_of_float32(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, random_model(FAMILIES[name]))
    expected = every_logit(load_runner(LoadOptions(model_path=str(folder), device="cpu", dtype="float32")), len(IDS))
    for dtype in ("float16", "bfloat16"):
        runner = load(folder, dtype=dtype, num_blocks=40, max_num_seqs=4)
        for num_at_once in (len(IDS), 100, 1):
            error = (every_logit(runner, num_at_once) - expected).norm() / expected.norm()
            assert error < 2e-2, (dtype, num_at_once, float(error))


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        (WIDE, "float16"),
        (replace(WIDE, act_order=True, sym=False), "bfloat16"),
        (replace(WIDE, family="mistral", more_config={"sliding_window": 40}, act_order=True), "float16"),
        (replace(WIDE, family="qwen3", tie=True, group_size=-1), "float16"),
        (replace(WIDE, family="qwen2", attention_bias=True, act_order=True), "bfloat16"),
    ],
    ids=["plain", "act-order, asymmetric", "mistral", "qwen3", "qwen2"],
)
def test_a_text_of_heads_of_128(recipe: Recipe, dtype: str, tmp_path: Path) -> None:
    """Alone and in company: logits near float32's, and every token the likeliest after those before it or as good as
    that."""
    folder = write_checkpoint(tmp_path, random_model(recipe))
    exact = load_runner(LoadOptions(model_path=str(folder), device="cpu", dtype="float32"))
    runner = load(folder, dtype=dtype, num_blocks=200, max_num_seqs=4)
    assert isinstance(runner, CudaRunner)
    expected = every_logit(exact, len(IDS))
    assert (every_logit(runner, 1) - expected).norm() / expected.norm() < 2e-2

    prompts, greedy = [IDS[:40], IDS[40:45], IDS[50:150]], {"max_tokens": 100, "temperature": 0.0}
    for max_num_seqs in (1, 3):
        texts = run(runner, prompts, [greedy] * 3, max_num_seqs=max_num_seqs).tokens
        for i, prompt in enumerate(prompts):
            assert len(texts[i]) == 100
            whole = Solo([*prompt, *texts[i]], SamplingParams(max_tokens=1), block_table=list(range(3, 18)))
            logits, _ = exact.logits(step_of([whole], [len(whole.token_ids)]), every_row=True)
            after = logits[len(prompt) - 1 : -1]
            chosen = after.gather(1, torch.tensor(texts[i])[:, None])[:, 0]
            assert float((after.max(1).values - chosen).max()) < 0.1 * float(after.std())


def test_an_fp8_cache_is_near(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, random_model(FAST))
    expected = every_logit(load_runner(LoadOptions(model_path=str(folder), device="cpu", dtype="float32")), len(IDS))
    runner = load(folder, kv_cache_dtype="fp8", num_blocks=40, max_num_seqs=4)
    plain = load(folder, num_blocks=40, max_num_seqs=4)
    assert runner.cache_bytes * 2 == plain.cache_bytes
    for num_at_once in (len(IDS), 1):
        error = (every_logit(runner, num_at_once) - expected).norm() / expected.norm()
        assert 0 < error < 6e-2, (num_at_once, float(error))


@pytest.mark.parametrize(
    ("recipe", "more"), [(FAST, {"dtype": "float32"}), (replace(FAST, head_dim=32), {}), (FAST, {"block_size": 4})]
)
def test_what_the_kernels_do_not_take_runs_in_float32(recipe: Recipe, more: dict[str, Any], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, random_model(recipe))
    runner = load(folder, num_blocks=100, **more)
    assert isinstance(runner, CpuRunner) and runner.device.startswith("cuda") and runner.dtype == "float32"
    solo = Solo(list(IDS), SamplingParams(max_tokens=1), block_table=list(range(-(-len(IDS) // runner.block_size))))
    got, _ = runner.logits(step_of([solo], [len(IDS)]), every_row=True)
    expected = every_logit(load_runner(LoadOptions(model_path=str(folder), device="cpu", dtype="float32")), len(IDS))
    assert (got.cpu() - expected).abs().max() < 1e-2


def test_not_finite_is_one_sequences_fault_and_leaves_no_trace(tmp_path: Path) -> None:
    runner = load(write_checkpoint(tmp_path, random_model(FAST)), num_blocks=24, max_num_seqs=64)
    assert isinstance(runner, CudaRunner)
    runner._model._embedding[90] = torch.nan
    healthy = [[5, 6, 7, 8], [9] * 100, [11] * 17]
    greedy: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0}
    expected = run(runner, healthy, [greedy] * 3).tokens
    sick = [[4, 90, 6], [90] * 130]
    mixed = run(runner, sick + healthy, [greedy] * 5)
    assert mixed.finished[0] == mixed.finished[1] == "error" and mixed.tokens[0] == mixed.tokens[1] == []
    assert [mixed.tokens[i + 2] for i in range(3)] == [expected[i] for i in range(3)]
    # Whoever owns the sick sequences' blocks next sees them beyond its own end.
    heirs = run(runner, healthy * 3, [greedy] * 9)
    assert [heirs.tokens[i] for i in range(9)] == [expected[i % 3] for i in range(9)]


def test_a_text_to_the_very_end_of_the_context(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, random_model(replace(FAST, max_position_embeddings=96)))
    runner = load(folder, max_num_seqs=3, num_blocks=None)
    assert (runner.max_model_len, runner.num_blocks) == (96, 18)
    texts = run(runner, [[7] * 95, [8] * 10, [9] * 90], [{"max_tokens": n, "temperature": 0.0} for n in (1, 86, 6)])
    assert [len(texts.tokens[i]) for i in range(3)] == [1, 86, 6]
    assert set(texts.finished.values()) == {"length"}


def test_memory_is_planned(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, random_model(replace(FAST, max_position_embeddings=2**17)))
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    free_before = torch.cuda.mem_get_info()[0]
    taken = total - free_before  # tests in other processes have memory too
    share = 0.2 + taken / total
    runner = load(folder, max_num_seqs=256, num_blocks=None, gpu_memory_utilization=share)
    used = free_before - torch.cuda.mem_get_info()[0]
    assert used < share * total
    assert used > share * total - taken - 2**30
    assert f"KV cache {runner.cache_bytes / 2**20:.0f} MiB" in runner.description and "workspace" in runner.description


@pytest.mark.parametrize("num_blocks", [2000, 40], ids=["roomy", "crowded"])
def test_grammars_are_followed_and_nobody_else_notices(num_blocks: int) -> None:
    runner = load(DEMO_PATH, num_blocks=num_blocks)
    tokenizer = load_tokenizer(DEMO_PATH)
    plain, mixed = World(runner, tokenizer, num_blocks), World(runner, tokenizer, num_blocks)
    crowd(plain, "")
    constrained = crowd(mixed, json_schema(SCHEMA))
    for i in mixed.tokens:
        if i in constrained:
            jsonschema.validate(json.loads(mixed.text(i)), SCHEMA)
        else:
            same = sum(a == b for a, b in zip(mixed.tokens[i], plain.tokens[i], strict=True))
            assert same >= 1 and len(mixed.tokens[i]) == 40  # logits differ in their last bits in other company


def test_logprobs_of_prompts_are_those_of_float32_on_the_cpu(demo: LoadedRunner) -> None:
    """In graphs and out of them, in one step and in chunks, alone, beside others and preempted."""
    prompts = [(ids * 100)[:700] for ids in questions()[:12]]
    params = [{"max_tokens": 40, "temperature": 0.0, "prompt_logprobs": (None, 0, 5, 20)[i % 4]} for i in range(12)]
    reference = load("demo", device="cpu", dtype="float32", num_blocks=1000, max_num_seqs=12)
    expected = run(reference, prompts, params, max_num_seqs=12).scores
    ways: list[dict[str, Any]] = [
        {},
        {"max_num_seqs": 1},
        {"budget": 96, "steps_between": 3},
        {"budget": 300, "num_blocks": 230, "steps_between": 2},
    ]
    for way in ways:
        outcome = run(demo, prompts, params, **way)
        assert (outcome.num_preemptions > 0) == ("num_blocks" in way)
        assert set(outcome.scores) == {i for i in range(12) if i % 4}
        for i, entries in outcome.scores.items():
            assert len(entries) == len(prompts[i]) - 1
            pairs = list(zip(entries, expected[i], strict=True))
            errors = [abs(told.logprob - wanted.logprob) for (told, _), (wanted, _) in pairs]
            assert sum(errors) / len(errors) < 0.03 and max(errors) < 1.0
            near = [abs(rank - its_rank) <= 2 + its_rank // 4 for (_, rank), (_, its_rank) in pairs]
            assert sum(near) > 0.95 * len(near)
            for (told, rank), _ in pairs:
                assert len(told.top) == params[i]["prompt_logprobs"]
                assert rank > len(told.top) or told.top[rank - 1][1] == told.logprob, "not the same float"


def test_the_last_row_of_a_prompt_and_the_first_token_agree_on_their_logits(demo: LoadedRunner) -> None:
    """Of a prompt that ends with the token that a shorter one was answered with."""
    prompt = questions()[0]
    first = run(demo, [prompt], [{"max_tokens": 1, "temperature": 0.0, "top_logprobs": 5}])
    longer = [*prompt, first.tokens[0][0]]
    scores = run(demo, [longer], [{"max_tokens": 0, "temperature": 0.0, "prompt_logprobs": 5}], caching=False)
    told, rank = scores.scores[0][-1]
    assert rank == 1 and scores.tokens[0] == [] and scores.finished == {0: "length"}
    assert told.logprob == pytest.approx(first.logprobs[0][0].logprob, abs=0.05)
