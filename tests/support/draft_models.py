"""A draft model beside a runner, and what requests get from the whole engine then: on any device."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptq_api.engine.core import Engine
from gptq_api.grammar.matchers import Grammars
from gptq_api.runner.cuda.runner import CudaRunner
from gptq_api.runner.load import load_runner
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.options import LoadOptions
from gptq_api.scheduler.blocks import BlockManager
from gptq_api.scheduler.model_drafts import ModelDrafts
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.scheduler.speculation import Speculation
from gptq_api.types import Add, SamplingParams, TokenLogprobs, pack_ids, unpack_ids
from tests.support.draft_sources import Silent
from tests.support.letters import letters

NUM_BLOCKS, NUM_TOKENS, BUDGET = 200, 40, 64
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.2},
    {"temperature": 0.0, "frequency_penalty": 0.6, "top_logprobs": 2},
    {"temperature": 0.7, "min_p": 0.02, "logit_bias": {7: 2.0}, "min_tokens": 5, "stop_token_ids": (8, 9)},
]


@dataclass(slots=True)
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish: str = ""


def on_cuda(folder: Path, draft: Path | None = None, **settings: Any) -> CudaRunner:
    """`draft`: a model or a head beside it; `settings`: of LoadOptions."""
    made: dict[str, Any] = {"device": "cuda", "num_blocks": NUM_BLOCKS, "max_num_seqs": 8, **settings}
    name = None if draft is None else str(draft)
    runner = load_runner(LoadOptions(model_path=str(folder), draft_model=name, **made))
    assert isinstance(runner, CudaRunner)
    return runner


def drafting(runner: LoadedRunner) -> Speculation | None:
    """Rows cost nothing, so that it is always asked."""
    if runner.drafter is None:
        return None
    runner.drafter.step_cost = runner.drafter.row_cost = runner.drafter.call_cost = 0.01
    return Speculation(Silent(), 8, 0.0, model=ModelDrafts(runner.drafter, runner.vocab_size, runner.block_size))


def answers(
    runner: LoadedRunner, kinds: list[dict[str, Any]], *, preempts: bool = False, caching: bool = True, times: int = 1
) -> tuple[list[Answer], Scheduler, int]:
    """(what each got the last time, the scheduler, steps). Two decode at a time; prompts are longer than a step."""
    scheduler = Scheduler(
        BlockManager(NUM_BLOCKS, runner.block_size),
        2,
        BUDGET,
        caching,
        speculation=drafting(runner),
        prompts_apart=runner.prompts_apart,
    )
    grammars = Grammars(lambda: letters(runner.vocab_size), runner.vocab_size)
    engine: Engine[Any] = Engine(runner, scheduler, grammars=grammars)
    rng, num_steps = random.Random(1), 0
    shared = [rng.randrange(3, 96) for _ in range(40)]
    prompts = [shared[: 40 * (i % 2)] + [rng.randrange(3, 96) for _ in range((5, 90, 33)[i % 3])] for i in range(9)]
    for _ in range(times):
        found = [Answer() for _ in kinds]
        for i, kind in enumerate(kinds):
            made = SamplingParams(**{"max_tokens": NUM_TOKENS, "seed": i, **kind})
            engine.add(Add(i, pack_ids(prompts[i]), (made,)))
        while engine.has_work():
            output = engine.step()
            if output is None:
                continue
            columns = zip(unpack_ids(output.sequence_ids), unpack_ids(output.tokens), strict=True)
            for place, (i, token) in enumerate(columns):
                found[i].tokens.append(token)
                found[i].logprobs.append(output.logprobs.get(place))
            for i, reason in output.finished.items():
                found[i].finish = reason
            num_steps += 1
            if preempts and scheduler.running and num_steps % 5 == 0:
                scheduler.preempt(rng.choice(scheduler.running))
    return found, scheduler, num_steps
