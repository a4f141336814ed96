"""What a request gets from the whole engine, tokens and logprobs to the last bit, whatever goes on beside it: alone,
among 31 others, in chunks, preempted, behind a cached prefix, on 1, 2 and 3 threads, drafted by whom it may be."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from gptq_api.engine.core import Engine
from gptq_api.runner.cpu import native
from gptq_api.runner.cpu.runner import CpuRunner
from gptq_api.runner.load import load_runner
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.solo import Solo, step_of
from gptq_api.scheduler.blocks import BlockManager
from gptq_api.scheduler.drafts import LONGEST_MATCH, DraftSource, Guess, PastAnswers, TextDrafts
from gptq_api.scheduler.scheduler import Counters, Scheduler
from gptq_api.scheduler.sequence import Sequence
from gptq_api.scheduler.speculation import Speculation
from gptq_api.types import Add, SamplingParams, TokenLogprobs, pack_ids, unpack_ids
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.draft_sources import Fickle, Garbage, Truth
from tests.support.lagging_runner import LaggingRunner

WINDOWS = {"use_sliding_window": True, "sliding_window": 37, "max_window_layers": 1}
MODELS: dict[str, Recipe | None] = {
    "demo": None,
    "act-order, odd sizes, 3 to one": Recipe(
        vocab_size=101, hidden_size=96, intermediate_size=176, num_heads=6, act_order=True, sym=False
    ),
    "windows, norms of heads": Recipe(family="qwen3", head_dim=32, group_size=64, more_config=WINDOWS),
    "biases, every head its own, one group, mixed bits": Recipe(
        family="qwen2", num_kv_heads=4, group_size=-1, mixed_bits={"k_proj": 8, "down_proj": 3}
    ),
}
SUBJECTS, COMPANY, NUM_TOKENS = 5, 32, 12
NUM_BLOCKS = 400
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.2},
    {"temperature": 0.0, "frequency_penalty": 0.6, "top_logprobs": 0},
    {"temperature": 0.7, "min_p": 0.02, "logit_bias": {7: 2.0}, "min_tokens": 5, "stop_token_ids": (8, 9)},
]


SETS = native.module().instruction_sets() if native.is_available() else [""]


@dataclass(slots=True)
class Answer:
    tokens: list[int]
    logprobs: list[TokenLogprobs]


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before, torch_s = native.num_threads(), torch.get_num_threads()
    yield
    native.use_threads(before)
    torch.set_num_threads(torch_s)


@pytest.fixture(scope="module", params=MODELS)
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    recipe = MODELS[request.param]
    return "demo" if recipe is None else str(write_checkpoint(tmp_path_factory.mktemp("bits"), random_model(recipe)))


def load(model_path: str, dtype: str, num_threads: int = 1) -> CpuRunner:
    options = LoadOptions(
        model_path=model_path,
        device="cpu",
        dtype=dtype,
        num_threads=num_threads,
        num_blocks=NUM_BLOCKS,
        max_model_len=200,
    )
    runner = load_runner(options)
    assert isinstance(runner, CpuRunner)
    return runner


def requests(vocab_size: int) -> list[tuple[list[int], SamplingParams]]:
    """The first few are those that are looked at. Every other prompt begins like another."""
    rng, made = random.Random(1), []
    shared = [rng.randrange(3, vocab_size) for _ in range(50)]
    for i in range(COMPANY):
        own = [rng.randrange(3, vocab_size) for _ in range((1, 5, 16, 33, 70, 100)[i % 6])]
        params = SamplingParams(**{"max_tokens": NUM_TOKENS, "seed": i, "top_logprobs": 3, **KINDS[i % len(KINDS)]})
        made.append((shared[: 48 + i % 3] + own if i % 2 else own, params))
    return made


def answers(
    runner: Any,
    wanted: range,
    *,
    budget: int = 512,
    preempts: bool = False,
    caching: bool = False,
    times: int = 1,
    source: DraftSource | None = None,
) -> tuple[list[Answer], Counters]:
    """What the `wanted` of the requests get, the last time where they are asked several times. `preempts`: every third
    step somebody has to begin anew. `source`: drafts, which are always tried."""
    blocks = BlockManager(NUM_BLOCKS, runner.block_size)
    speculation = None if source is None else Speculation(source, runner.max_draft_rows, row_cost=0.0)
    more = {"shared_rows": runner.shared_rows, "prompts_apart": runner.prompts_apart}
    scheduler = Scheduler(blocks, COMPANY, budget, caching, speculation=speculation, **more)
    engine, asked, rng = Engine(runner, scheduler), requests(runner.vocab_size), random.Random(2)
    num_steps = 0
    for _ in range(times):
        found = {i: Answer([], []) for i in wanted}
        waiting = list(wanted)
        while waiting or engine.has_work():
            for i in waiting[:3]:  # three come with every step
                engine.add(Add(i, pack_ids(asked[i][0]), (asked[i][1],)))
            del waiting[:3]
            output = engine.step()
            if output is None:  # a step ahead
                continue
            assert not set(output.finished.values()) - {"length", "stop"}
            columns = zip(unpack_ids(output.sequence_ids), unpack_ids(output.tokens), strict=True)
            for place, (i, token) in enumerate(columns):
                found[i].tokens.append(token)
                found[i].logprobs.append(output.logprobs[place])
            num_steps += 1
            if preempts and scheduler.running and num_steps % 3 == 0:
                scheduler.preempt(rng.choice(scheduler.running))
    return [found[i] for i in wanted], scheduler.counters


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_request_gets_the_same_bits_whatever_goes_on_beside_it(
    model_path: str, dtype: str, instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model_path == "demo" and instruction_set != SETS[0]:
        pytest.skip("one instruction set of the demo suffices")
    monkeypatch.setenv("GPTQ_CPU_INSTRUCTION_SET", instruction_set)
    runner, everybody = load(model_path, dtype), range(COMPANY)
    alone = [answers(runner, range(i, i + 1))[0][0] for i in range(SUBJECTS)]
    assert all(len(one.tokens) == len(one.logprobs) == NUM_TOKENS for one in alone)
    assert len({tuple(one.tokens) for one in alone}) == SUBJECTS

    def same(found: list[Answer]) -> bool:
        return found[:SUBJECTS] == alone

    assert same(answers(runner, everybody)[0])
    assert same(answers(runner, everybody, budget=37)[0])
    found, counters = answers(runner, everybody, preempts=True)
    assert same(found) and counters.preemptions > 5
    found, counters = answers(runner, everybody, caching=True, times=2)
    assert same(found) and counters.prefix_hits > 1000
    for num_threads in (2, 3):
        several = load(model_path, dtype, num_threads)
        found, counters = answers(several, everybody, budget=61, preempts=True, caching=True)
        assert same(found) and counters.preemptions > 5 and counters.prefix_hits > 100
        assert answers(several, range(1))[0] == alone[:1]


@pytest.mark.parametrize(
    ("dtype", "ours"), [("auto", True), ("float32", True), ("bfloat16", True), ("auto", False), ("float32", False)]
)
def test_drafts_change_no_bit(model_path: str, dtype: str, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever drafts, on a runner that looks ahead or not, one sequence or three, preempted or not; by kernels of ours
    and in torch."""
    if not ours:
        if model_path == "demo":
            pytest.skip("slow in torch")
        monkeypatch.setattr(native, "_cpu", None)
    runner = load(model_path, dtype)
    plain = [answers(runner, range(i, i + 1))[0][0] for i in range(SUBJECTS)]
    asked = requests(runner.vocab_size)

    def following(seq: Sequence, tokens: list[int]) -> int:
        place, text = len(tokens) - seq.num_prompt_tokens, plain[seq.sequence_id].tokens
        return text[place] if place < len(text) and tokens[: seq.num_prompt_tokens] == asked[seq.sequence_id][0] else -1

    truth, garbage = Truth(following), Garbage(runner.vocab_size)
    sources: list[DraftSource] = [truth, garbage, Fickle(truth, garbage), TextDrafts(PastAnswers())]
    for source in sources:
        for either in (runner, LaggingRunner(runner)):
            for wanted in (range(1), range(1, 4), range(4, 5)):
                found, counters = answers(either, wanted, source=source, preempts=len(wanted) > 1, times=2)
                assert found == plain[wanted.start : wanted.stop]
                if source is not truth:
                    continue
                assert counters.accepted_tokens == counters.draft_tokens > 2 * counters.drafts * (len(wanted) == 1)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("ours", [True, False])
def test_logits_are_the_same_bits_alone_and_among_rows_of_their_own_sequence(
    model_path: str, dtype: str, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row is what decoding computes, 2 to 8 what a step with drafts does; from either side of a block's end, and on
    contexts that torch sums in other orders."""
    if not ours:
        monkeypatch.setattr(native, "_cpu", None)
    runner = load(model_path, dtype)
    rng = random.Random(3)
    ids = [rng.randrange(3, runner.vocab_size) for _ in range(190)]
    for context in (1, 14, 60, 121, 180):
        solo = Solo(ids[: context + 8], SamplingParams(max_tokens=9), list(range(13)))
        runner.logits(step_of([solo], [context]))
        alone = [runner.logits(step_of([solo], [1]), every_row=True)[0][0] for _ in range(8)]
        for num_rows in range(2, 9):
            solo.num_computed_tokens = context
            together = runner.logits(step_of([solo], [num_rows]), every_row=True)[0]
            assert torch.equal(together, torch.stack(alone[:num_rows]))


def test_a_wrong_draft_whose_numbers_are_not_finite_leaves_no_trace(model_path: str) -> None:
    if model_path == "demo":
        pytest.skip("its embedding is its head")
    runner: Any = load(model_path, "auto")
    (plain,), _ = answers(runner, range(2, 3))
    used = {*plain.tokens, *requests(runner.vocab_size)[2][0]}
    poison = next(token for token in range(runner.vocab_size) if token not in used)
    runner._model.embedding[poison] = torch.nan

    class Poison:
        def guess(self, seq: Sequence, most: int) -> Guess | None:
            return Guess([poison] * most, LONGEST_MATCH, "poison")

        def ended(self, seq: Sequence) -> None:
            pass

    found, counters = answers(runner, range(2, 3), source=Poison())
    assert found == [plain] and counters.drafts > 5 and counters.accepted_tokens == 0
