"""A draft model beside a served one, in process: what a token of it takes, and how many tokens a second come by how
often it is right. Plain decode of the same run beside each row.

    python benchmarks/draft_model.py --served llama-13b --draft llama-160m --out benchmarks/results
    python benchmarks/draft_model.py --served llama-3-8b --draft eagle3 --out benchmarks/results

Weights are random (gptq_api/bench/synthetic.py), so that no small model knows what the large one says. The draft model
does all that it does in a server, and what it has guessed is exchanged afterwards for what is known to come, each token
as often as the row says: the time is that of a draft model that is right so often. The text of every row is compared
with that of plain decode. `eagle3` is an EAGLE-3 head of the served model's widths, with up to 32,000 tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gptq_api.bench.synthetic import SHAPES, synthetic_checkpoint, write_eagle_head, write_folder
from gptq_api.engine.core import Engine
from gptq_api.runner.backends import backend_of, resolve_device
from gptq_api.runner.load import make_runner
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.options import LoadOptions
from gptq_api.scheduler.blocks import BlockManager
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.scheduler.speculation import Speculation, speculation_of
from gptq_api.step import DraftRequest
from gptq_api.types import Add, SamplingParams, pack_ids, unpack_ids

RIGHT = (1.0, 0.9, 0.8, 0.7, 0.6, 0.4, 0.0)


class Informed:
    """A drafter that is told what comes, once it has done its work."""

    def __init__(self, drafter: Any, texts: dict[int, list[int]], right: float) -> None:
        """`texts`: by a prompt's last token, what its sequence will say."""
        self._drafter, self._texts, self._right, self._rng = drafter, texts, right, random.Random(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)

    def draft(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        found: list[list[int]] = self._drafter.draft(requests)
        return [self._exchanged(request, tokens) for request, tokens in zip(requests, found, strict=True)]

    def _exchanged(self, request: DraftRequest, tokens: list[int]) -> list[int]:
        text = self._texts[request.token_ids[request.num_prompt_tokens - 1]]
        start = len(request.token_ids) - request.num_prompt_tokens
        known = text[start : start + len(tokens)]
        return [token if self._rng.random() < self._right else token ^ 1 for token in known]


def run(
    runner: LoadedRunner, prompts: list[list[int]], num: int, speculation: Speculation | None
) -> tuple[list[list[int]], float, int]:
    """(tokens of each, seconds from the first token to the last, steps)."""
    blocks = BlockManager(runner.num_blocks, runner.block_size)
    costs = runner.prompt_costs
    engine = Engine(runner, Scheduler(blocks, 8, 512, False, speculation=speculation, prompt_costs=costs))
    tokens: list[list[int]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.add(Add(i, pack_ids(prompt), (SamplingParams(max_tokens=num, seed=i),)))
    began, num_steps = 0.0, 0
    while engine.has_work():
        out = engine.step()
        if out is None:
            continue
        for i, token in zip(unpack_ids(out.sequence_ids), unpack_ids(out.tokens), strict=True):
            tokens[i].append(token)
        began = began or (time.perf_counter() if all(tokens) else 0.0)
        num_steps += 1
    return tokens, time.perf_counter() - began, num_steps


def measure(runner: LoadedRunner, num: int, batches: Sequence[int]) -> list[dict[str, Any]]:
    rows, rng, drafter = list[dict[str, Any]](), random.Random(0), runner.drafter
    for batch in batches:
        prompts = [[rng.randrange(6, runner.vocab_size) for _ in range(128)] for _ in range(batch)]
        run(runner, prompts, 8, None)
        plain, plain_seconds, _ = run(runner, prompts, num, None)
        texts = {prompt[-1]: text for prompt, text in zip(prompts, plain, strict=True)}
        for right in RIGHT:
            informed: Any = Informed(drafter, texts, right)
            speculation = speculation_of("ngram", runner, informed, runner.block_size)
            tokens, seconds, num_steps = run(runner, prompts, num, speculation)
            made = batch * (num - 1)
            row = {
                "batch": batch,
                "right": right,
                "tok_s": round(made / seconds, 2),
                "plain_tok_s": round(made / plain_seconds, 2),
                "gain": round(plain_seconds / seconds, 3),
                "tokens_a_step": round(num / num_steps, 2),
                "same_text": tokens == plain,
            }
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--served", choices=sorted(SHAPES), default="llama-13b")
    parser.add_argument("--draft", choices=[*sorted(SHAPES), "eagle3"], default="llama-160m")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--num-tokens", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--commit", default="", help="what was measured")
    parser.add_argument("--out", type=Path, help="folder for draft-model-<device>.json")
    args = parser.parse_args()
    device = resolve_device(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        if args.draft == "eagle3":
            write_eagle_head(args.served, Path(scratch) / "draft")
        else:
            write_folder(args.draft, Path(scratch) / "draft")
        served = synthetic_checkpoint(args.served, Path(scratch) / "served", group_size=128)
        options = LoadOptions(
            model_path=str(served.folder),
            draft_model=str(Path(scratch) / "draft"),
            device=args.device,
            max_num_seqs=8,
            packed_cache="off",
        )
        runner = make_runner(options, served, device)
        assert runner.drafter is not None
        costs = {
            **{name: round(getattr(runner, name), 5) for name in ("row_cost", "wait_cost", "context_cost")},
            **{f"draft_{name}": round(getattr(runner.drafter, name), 5) for name in ("step_cost", "call_cost")},
        }
        print(runner.description)
        print(costs, flush=True)
        result = {
            "device": backend_of(device).device_name(device),
            "torch": torch.__version__,
            "commit": args.commit,
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "costs": costs,
            "rows": measure(runner, args.num_tokens, args.batches),
        }
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"draft-model-{str(result['device']).lower().replace(' ', '-')}.json"
        models = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(models | {f"{args.served} + {args.draft}": result}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
