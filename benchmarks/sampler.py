"""The sampler on this GPU: what a step's draw costs, and whether a seed gives the same text in company.

    python benchmarks/sampler.py --out benchmarks/results
    PYTHONPATH=../before python benchmarks/sampler.py --commit SHA --out benchmarks/results   # another commit beside it

Times are of `sample` on random logits (normal, deviation 3) in a CUDA graph, the logits rotated past the L2. Texts are
those of 24 prompts, sampled at temperature 0.8 with a seed of their own: alone, alone once more, in groups of 4 and
among 64, the others being prompts of the same kind. The file has one entry per commit.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Clock, ceilings, in_turns, machine

from gptq_api.bench.synthetic import SHAPES, synthetic_checkpoint
from gptq_api.checkpoint.checkpoint import open_checkpoint
from gptq_api.config import Settings
from gptq_api.engine.core import Engine
from gptq_api.kernels import sampling
from gptq_api.runner.backends import token_budget
from gptq_api.runner.load import make_runner
from gptq_api.runner.options import LoadOptions
from gptq_api.scheduler.blocks import BlockManager
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.text.folder import checkpoint_folder
from gptq_api.types import Add, SamplingParams, pack_ids, unpack_ids

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 0.7, top_p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "temperature 0.7, top_k 50": {"temperature": 0.7, "top_k": 50},
    "temperature 0.7, min_p 0.05": {"temperature": 0.7, "min_p": 0.05},
}
SIZES = [(vocab, rows) for vocab in (32_000, 128_256) for rows in (1, 8, 64, 256)]
ROTATED_BYTES = 128 * 2**20
NUM_TEXTS, NUM_TOKENS = 24, 64


class Draws:
    """Calls of `sample` on rotating logits of one size, with one kind of parameters."""

    def __init__(self, logits: list[torch.Tensor], params: dict[str, Any]) -> None:
        rows = logits[0].shape[0]
        table = sampling.SamplingTable(rows)
        for slot in range(rows):
            table.set(slot, SamplingParams(max_tokens=1, **{"seed": slot, **params}), 100)
        staging = torch.empty(sampling.FIELDS, rows, dtype=torch.int32, pin_memory=True)
        table.fill(staging.numpy(), list(range(rows)), [100] * rows)
        self.logits, self.inputs = logits, sampling.SamplingInputs(staging.cuda())
        self.history = torch.zeros(rows, 128, dtype=torch.int32, device="cuda")
        self.tokens = torch.zeros(rows, dtype=torch.int32, device="cuda")

    def __call__(self) -> None:
        for logits in self.logits:
            sampling.sample(logits, self.inputs, self.history, self.tokens)


def times() -> list[dict[str, Any]]:
    found, clock = [], Clock()
    for vocab, rows in SIZES:
        copies = min(64, max(4, ROTATED_BYTES // (vocab * rows * 4)))
        logits = [torch.randn(rows, vocab, device="cuda") * 3 for _ in range(copies)]
        clock.settle()
        micros = in_turns([(Draws(logits, params), copies) for params in KINDS.values()])
        for kind, value in zip(KINDS, micros, strict=True):
            found.append({"vocab_size": vocab, "rows": rows, "kind": kind, "us": round(value, 2)})
        print(f"V {vocab}  rows {rows}  " + "  ".join(f"{k} {v:.1f}" for k, v in zip(KINDS, micros, strict=True)))
    return found


class Texts:
    """Sampled texts of one model, in any company."""

    def __init__(self, options: LoadOptions, checkpoint: Any) -> None:
        self.options = options
        self.runner = make_runner(options, checkpoint, torch.device("cuda", torch.cuda.current_device()))
        drawn = random.Random(0)
        self.prompts = [drawn.choices(range(6, self.runner.vocab_size), k=drawn.randint(8, 64)) for _ in range(64)]

    def of(self, members: range) -> dict[int, list[int]]:
        """Tokens by prompt of one group, computed together."""
        blocks = BlockManager(self.runner.num_blocks, self.runner.block_size)
        budget = token_budget(self.options, torch.device(self.runner.device))
        scheduler = Scheduler(blocks, self.options.max_num_seqs, budget, False, self.runner.row_multiple)
        engine = Engine(self.runner, scheduler)
        for i in members:
            params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, seed=1000 + i)
            engine.add(Add(i, pack_ids(self.prompts[i]), (params,)))
        tokens: dict[int, list[int]] = {i: [] for i in members}
        while engine.has_work():
            out = engine.step()
            if out is not None:
                for i, token in zip(unpack_ids(out.sequence_ids), unpack_ids(out.tokens), strict=True):
                    tokens[i].append(token)
        return tokens

    def in_groups(self, size: int, most: int = NUM_TEXTS) -> dict[int, list[int]]:
        tokens: dict[int, list[int]] = {}
        for start in range(0, most, size):
            tokens |= self.of(range(start, start + size))
        return tokens


def same_texts(options: LoadOptions, checkpoint: Any, name: str) -> dict[str, Any]:
    texts = Texts(options, checkpoint)
    alone = texts.in_groups(1)

    def same(other: dict[int, list[int]]) -> int:
        return sum(other[i] == tokens for i, tokens in alone.items())

    row = {
        "model": name,
        "dtype": texts.runner.dtype,
        "texts": NUM_TEXTS,
        "tokens_each": NUM_TOKENS,
        "temperature": 0.8,
        "same_alone_again": same(texts.in_groups(1)),
        "same_in_groups_of_4": same(texts.in_groups(4)),
        "same_among_64": same(texts.of(range(64))),
    }
    print(json.dumps(row), flush=True)
    return row


def each_model(names: list[str], measure: Callable[[LoadOptions, Any, str], dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            if name in SHAPES:
                checkpoint = synthetic_checkpoint(
                    name, Path(scratch) / name, group_size=128, act_order=False, dense=False
                )
            else:
                checkpoint = open_checkpoint(checkpoint_folder(name))
            settings = Settings.model_validate(
                {"model_path": str(checkpoint.folder), "device": "cuda", "enable_prefix_caching": False}
            )
            options = LoadOptions.of(settings)
            rows.append(measure(options, checkpoint, name))
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def save(result: dict[str, Any], folder: Path) -> None:
    """One file per GPU, one entry per commit."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sampler-{result['gpu'].lower().replace(' ', '-')}.json"
    runs = json.loads(path.read_text()) if path.exists() else []
    runs = [run for run in runs if run["commit"] != result["commit"]]
    path.write_text(json.dumps([*runs, result], indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,llama-13b", help=f"folders, or of {', '.join(SHAPES)}; '': none")
    parser.add_argument("--commit", help="what was measured, where there is no git")
    parser.add_argument("--out", type=Path, help="folder for sampler-<gpu>.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no benchmark: torch finds no CUDA device")
    copy, multiply = ceilings()
    result = machine(args.commit) | {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "copy_tb_s": round(copy, 3),
        "cublas_tflops": round(multiply, 1),
        "times": times(),
        "texts": each_model([name for name in args.models.split(",") if name], same_texts),
    }
    if args.out is not None:
        save(result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
