"""The engine on this GPU, in process, without HTTP: decode at batch 1 to 256, prefill, first token, mixed requests,
memory after load, how long the device waits between two steps, and what grammars cost. 4-bit beside FP16 of the same
shape through the same runner.

    python benchmarks/decode.py --synthetic llama-13b --out benchmarks/results      # some minutes
    python benchmarks/decode.py --model-path /models/llama-13b-gptq --parts decode --batches 1,8

Synthetic weights are random (gptq_api/bench/synthetic.py), prompts are random token ids, nothing is shared between
prompts. Decode rates are those of the steps in which every sequence of the batch gets its next token and nothing else
happens, taken from the clock as the engine's caller sees it; medians where there are several runs.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gpu_timing import ceilings, machine

from gptq_api.bench.synthetic import SHAPES, synthetic_checkpoint
from gptq_api.checkpoint.checkpoint import Checkpoint, open_checkpoint
from gptq_api.checkpoint.dense import dequantized
from gptq_api.config import Settings
from gptq_api.engine.core import Engine
from gptq_api.grammar.compile import json_schema
from gptq_api.grammar.matchers import Grammars
from gptq_api.grammar.vocabulary import vocabulary
from gptq_api.runner.backends import token_budget
from gptq_api.runner.load import make_runner
from gptq_api.runner.options import LoadOptions
from gptq_api.scheduler.blocks import BlockManager
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.text.tokenizer import load_tokenizer
from gptq_api.types import Add, SamplingParams, pack_ids

PARTS = ("decode", "long", "prefill", "first", "mixed", "closed", "gaps", "grammar")
MIXED_REQUESTS = 256
"""about 530 tokens in and 140 out on average"""


SCHEMA = {
    "type": "array",
    "minItems": 1000,  # more than there are tokens for
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "role": {"enum": ["author", "reader"]}},
        "required": ["name", "age", "role"],
        "additionalProperties": False,
    },
}
MIN_STEPS = 16
"""that a decode rate is taken from"""


@dataclass(frozen=True)
class Variant:
    """How the weights are; `parts`: what is measured of it unless flags say otherwise."""

    group_size: int = 128
    act_order: bool = False
    dense: bool = False
    parts: tuple[str, ...] = PARTS[:-1]


VARIANTS = {
    "g128": Variant(),
    "g128-act-order": Variant(act_order=True, parts=("decode",)),
    "g-1": Variant(group_size=-1, parts=("decode",)),
    "fp16": Variant(dense=True, parts=("decode", "prefill", "first", "mixed")),
}


@dataclass(frozen=True)
class Step:
    """A step as the engine's caller saw it."""

    at: float
    """seconds, when its tokens were there"""
    sampled: int
    computed: int
    """tokens whose K/V it computed"""


class Measured:
    """One loaded model and the rows measured of it."""

    def __init__(self, variant: str, checkpoint: Checkpoint, options: LoadOptions) -> None:
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        self.runner = make_runner(options, checkpoint, torch.device("cuda", torch.cuda.current_device()))
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        self.variant, self.options, self.rows = variant, options, list[dict[str, Any]]()
        self.folder = checkpoint.folder
        self.random = random.Random(0)
        gc.collect()
        gc.freeze()  # as the engine process does
        free, total = torch.cuda.mem_get_info()
        self.row(
            "load",
            seconds=round(seconds, 2),
            weights_mib=self.runner.weight_bytes >> 20,
            kv_cache_mib=self.runner.cache_bytes >> 20,
            kv_cache_tokens=self.capacity,
            workspace_mib=self.runner.workspace_bytes >> 20,
            allocated_mib=torch.cuda.memory_allocated() >> 20,
            peak_mib=torch.cuda.max_memory_allocated() >> 20,
            device_used_mib=(total - free) >> 20,
        )

    @property
    def capacity(self) -> int:
        return self.runner.num_blocks * self.runner.block_size

    def measure(self, part: str, batches: list[int], new_tokens: int) -> None:
        """All rows of one of PARTS."""
        if part in ("decode", "long"):
            context, new = (128, new_tokens) if part == "decode" else (2048, min(new_tokens, 64))
            for batch in batches:
                self.decode(batch, context, new)
        elif part == "prefill":
            self.prefill(32, 2048)
        elif part == "first":
            for length in (128, 512, 2048):
                self.first_token(length)
        elif part == "mixed":
            self.mixed()
        elif part == "grammar":
            for batch in batches:
                for constrained in sorted({0, 1, batch}):
                    self.grammar(batch, constrained, new_tokens)
        elif part == "closed":
            for batch in batches:
                self.closed(batch)
        else:
            for batch in (1, 64):
                self.gaps(batch)

    def row(self, part: str, **values: Any) -> None:
        entry = {"variant": self.variant, "part": part, **values}
        self.rows.append(entry)
        print("  ".join(f"{key} {value}" for key, value in entry.items()), flush=True)

    @cached_property
    def grammars(self) -> Grammars:
        """One for all engines, as a server has it."""
        tokenizer, vocab_size = load_tokenizer(self.folder), self.runner.vocab_size
        return Grammars(lambda: vocabulary(tokenizer, vocab_size, self.runner.eos_token_ids), vocab_size)

    def engine(self, max_num_seqs: int | None = None) -> Engine[Any]:
        blocks = BlockManager(self.runner.num_blocks, self.runner.block_size)
        budget = token_budget(self.options, torch.device(self.runner.device))
        users = max_num_seqs or self.options.max_num_seqs
        runner = self.runner
        scheduler = Scheduler(
            blocks,
            users,
            budget,
            False,
            runner.row_multiple,
            prompt_costs=runner.prompt_costs,
            prompts_apart=runner.prompts_apart,
        )
        return Engine(self.runner, scheduler, grammars=self.grammars)

    def add(self, engine: Engine[Any], lengths: list[tuple[int, int]], constrained: int = 0) -> None:
        """Sequences of (prompt tokens, new tokens); so many of them have to be JSON."""
        for i, (prompt, new) in enumerate(lengths):
            ids = self.random.choices(range(6, self.runner.vocab_size), k=prompt)
            params = SamplingParams(max_tokens=new, temperature=0)
            if i < constrained:
                ends = tuple(self.runner.eos_token_ids)
                params = SamplingParams(max_tokens=new, seed=i, grammar=json_schema(SCHEMA), stop_token_ids=ends)
            engine.add(Add(i, pack_ids(ids), (params,)))

    def run(
        self, lengths: list[tuple[int, int]], max_num_seqs: int | None = None, constrained: int = 0
    ) -> tuple[float, list[Step]]:
        """(when it began, its steps)."""
        engine = self.engine(max_num_seqs)
        self.add(engine, lengths, constrained)
        steps = []
        began = time.perf_counter()
        while engine.has_work():
            out = engine.step()
            if out is not None:
                steps.append(Step(time.perf_counter(), len(out.tokens) // 4, out.stats.num_batched_tokens))
        return began, steps

    def fits(self, batch: int, tokens: int) -> bool:
        return batch <= self.options.max_num_seqs and batch * (tokens + self.runner.block_size) <= self.capacity

    def decode(self, batch: int, context: int, new: int) -> None:
        if not self.fits(batch, context + new):
            self.row("decode", batch=batch, context=context, skipped="the KV cache does not hold it")
            return
        self.run([(16, 4)] * batch)
        found = common_steps(
            lambda new: self.run([(context, new)] * batch)[1], batch, new, lambda new: self.fits(batch, context + new)
        )
        if found is None:
            self.row("decode", batch=batch, context=context, skipped="the KV cache does not hold what all need at once")
            return
        whole, new = found
        gaps = [b - a for a, b in itertools.pairwise(whole)]
        mean = (whole[-1] - whole[0]) / len(gaps)
        self.row(
            "decode",
            batch=batch,
            context=context,
            new_tokens=new,
            tok_s=round(batch / mean, 1),
            step_ms=round(mean * 1e3, 3),
            median_step_ms=round(statistics.median(gaps) * 1e3, 3),
        )

    def grammar(self, batch: int, constrained: int, new: int) -> None:
        self.run([(16, 4)] * batch, constrained=constrained)
        steps = self.run([(128, new)] * batch, constrained=constrained)[1]
        whole = [step.at for step in steps if step.sampled == step.computed == batch]
        mean = (whole[-1] - whole[0]) / (len(whole) - 1)
        self.row("grammar", batch=batch, constrained=constrained, new_tokens=new, tok_s=round(batch / mean, 1))

    def prefill(self, batch: int, length: int) -> None:
        self.run([(length, 1)])
        began, steps = self.run([(length, 1)] * batch)
        seconds = steps[-1].at - began
        self.row("prefill", batch=batch, length=length, tok_s=round(batch * length / seconds, 1))

    def first_token(self, length: int, repeats: int = 7) -> None:
        times = []
        for _ in range(repeats):
            began, steps = self.run([(length, 1)])
            times.append(steps[-1].at - began)
        self.row("first", length=length, ms=round(statistics.median(times[1:]) * 1e3, 2))

    def mixed(self) -> None:
        drawn = random.Random(0)  # the same requests whatever has been measured before
        lengths = [(drawn.randint(32, 1024), drawn.randint(16, 264)) for _ in range(MIXED_REQUESTS)]
        began, steps = self.run(lengths)
        self.row(
            "mixed",
            requests=MIXED_REQUESTS,
            tokens_in=sum(prompt for prompt, _ in lengths),
            tokens_out=sum(new for _, new in lengths),
            seconds=round(steps[-1].at - began, 3),
        )

    def closed(self, batch: int, prompt: int = 128, new: int = 128) -> None:
        """As many users as `batch`, each with the next request when the last one ended: what benchmarks/serve.py sends
        over HTTP."""
        requests = max(32, 2 * batch)
        began, steps = self.run([(prompt, new)] * requests, batch)
        seconds = steps[-1].at - began
        self.row("closed", batch=batch, prompt=prompt, new_tokens=new, tok_s=round(requests * new / seconds, 1))

    def gaps(self, batch: int, num_steps: int = 24) -> None:
        """From the end of a decode step's last kernel to the beginning of the next step's first, from CUPTI's trace.

        The copy of the step's inputs lies between two steps and tells them apart; it is part of the gap.
        """
        engine = self.engine()
        self.add(engine, [(128, 64 + num_steps)] * batch)
        while (out := engine.step()) is None or len(out.tokens) // 4 < batch:
            pass
        for _ in range(8):
            engine.step()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            for _ in range(num_steps):
                engine.step()
            torch.cuda.synchronize()
        events = sorted(
            (event.time_range.start, event.time_range.end, event.name)
            for event in profile.events() or []
            if event.device_type == vars(torch.autograd)["DeviceType"].CUDA
        )
        found = step_gaps(events)
        for sequence_id in range(batch):
            engine.abort(sequence_id)
        while engine.has_work():
            engine.step()
        self.row(
            "gaps",
            batch=batch,
            steps=len(found),
            median_us=round(statistics.median(found), 2) if found else None,
            longest_us=round(max(found), 2) if found else None,
        )


def common_steps(
    run: Callable[[int], list[Step]], batch: int, new: int, fits: Callable[[int], bool]
) -> tuple[list[float], int] | None:
    """(when the steps ended in which all sequences decode, new tokens of each). `run`: the steps of `batch` sequences
    with so many new tokens. Where the first are through before the last one's prompt is, all get as many tokens more as
    the prompts take steps; None where that does not fit."""
    while True:
        steps = run(new)
        whole = [step.at for step in steps if step.sampled == step.computed == batch]
        if len(whole) > MIN_STEPS:
            return whole, new
        new += MIN_STEPS + sum(step.computed > step.sampled for step in steps)
        if not fits(new):
            return None


def step_gaps(events: list[tuple[float, float, str]]) -> list[float]:
    """Microseconds between steps from (start, end, name) of everything the device did, in order of start."""
    gaps: list[float] = []
    last_end, copied = None, False
    for start, end, name in events:
        if "Memcpy" in name or "Memset" in name:
            copied = copied or "HtoD" in name or "Pinned -> Device" in name
            continue
        if copied and last_end is not None:
            gaps.append(start - last_end)
        copied = False
        last_end = end if last_end is None else max(last_end, end)
    return gaps


def measure(
    variant: str, checkpoint: Checkpoint, options: LoadOptions, args: argparse.Namespace
) -> list[dict[str, Any]]:
    model = Measured(variant, checkpoint, options)
    for part in args.parts or VARIANTS[variant].parts:
        model.measure(part, args.batches, args.new_tokens)
    rows = model.rows
    del model
    gc.unfreeze()
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def checkpoint_of(variant: str, args: argparse.Namespace, folder: Path) -> Checkpoint:
    how = VARIANTS[variant]
    if args.synthetic is None:
        checkpoint = open_checkpoint(args.model_path)
        return dequantized(checkpoint) if how.dense else checkpoint
    target = folder / variant
    return synthetic_checkpoint(
        args.synthetic, target, group_size=how.group_size, act_order=how.act_order, dense=how.dense
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--synthetic", choices=sorted(SHAPES))
    which.add_argument("--model-path", type=Path, help="a GPTQ checkpoint; its FP16 row is itself, dequantized")

    def items(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(item) for item in text.split(",") if item]

    parser.add_argument("--variants", type=items(str), help=f"of {', '.join(VARIANTS)}; default: all that there are")
    parser.add_argument("--parts", type=items(str), help=f"of {', '.join(PARTS)}; default: what suits the variant")
    parser.add_argument("--batches", type=items(int), default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--options", default="", help="settings of the server, e.g. 'kv_cache_dtype=fp8 block_size=32'")
    parser.add_argument("--commit", help="what was measured, where there is no git")
    parser.add_argument("--out", type=Path, help="folder for decode-<gpu>.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no benchmark: torch finds no CUDA device")
    variants = args.variants or (list(VARIANTS) if args.synthetic else ["g128", "fp16"])
    if wrong := [name for name in variants if name not in VARIANTS] + [p for p in args.parts or [] if p not in PARTS]:
        parser.error(f"{wrong[0]!r} is neither a variant ({', '.join(VARIANTS)}) nor a part ({', '.join(PARTS)})")
    copy, multiply = ceilings()
    print(f"copy {copy:.2f} TB/s, cuBLAS 8192^3 {multiply:.0f} TFLOP/s", flush=True)
    flags = dict(item.split("=", 1) for item in args.options.split())
    result = machine(args.commit) | {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "model": args.synthetic or args.model_path.name,
        "options": flags,
        "copy_tb_s": round(copy, 3),
        "cublas_tflops": round(multiply, 1),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        for variant in variants:
            checkpoint = checkpoint_of(variant, args, Path(scratch))
            settings = Settings.model_validate({"model_path": str(checkpoint.folder), "device": "cuda", **flags})
            result["rows"] += measure(variant, checkpoint, LoadOptions.of(settings), args)
            save(result, args.out)
    return 0


def save(result: dict[str, Any], folder: Path | None) -> None:
    """After every variant, so that a run cut short leaves what it had; other models and options in the file stay,
    and so do other variants of the same commit."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"decode-{result['gpu'].lower().replace(' ', '-')}.json"
    models = json.loads(path.read_text()) if path.exists() else {}
    name = " ".join([result["model"], *(f"{key}={value}" for key, value in result["options"].items())])
    before = models.get(name, {"rows": []})
    measured = {row["variant"] for row in result["rows"]}
    kept = [row for row in before["rows"] if row["variant"] not in measured and before["commit"] == result["commit"]]
    models[name] = result | {"rows": kept + result["rows"]}
    path.write_text(json.dumps(models, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
