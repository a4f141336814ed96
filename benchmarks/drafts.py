"""Several tokens a step on this GPU, in process: what a step with drafts takes, what it brings by how often they are
right, and what speculation costs where nothing can be guessed. Plain decode of the same run beside each row.

    python benchmarks/drafts.py --synthetic llama-13b --commit 1a2b3c4 --out benchmarks/results

Weights are random (gptq_api/bench/synthetic.py), so nothing that the model says can be guessed. It says everything
twice instead: what it answered without drafts is known, and the drafts of the second time are it, each token right as
often as the row says. In the row "copy-edit" drafts are right where those of a real text would be: a prompt of 1,024
tokens is written out again with a fifth of it changed, the source of drafts that the server has looks for its last
tokens in that text, and where its guess is the next token of that text, the draft is the model's next token. The text
of every row is compared with that of plain decode.

"host_ms" is how long the device has nothing to do between two steps with drafts: from the end of the one, by an event,
until the host asks it for the next one's graph; "launch_ms" is the part of it that the runner takes to write and copy
the inputs. "device_ms" is the rest, from there to the end of the step, and "graph_ms" what asking takes the host.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from decode import Measured
from gpu_timing import ceilings, machine

from gptq_api.bench.synthetic import SHAPES, synthetic_checkpoint
from gptq_api.config import Settings
from gptq_api.engine.core import Engine
from gptq_api.runner.options import LoadOptions
from gptq_api.scheduler.blocks import BlockManager
from gptq_api.scheduler.drafts import LONGEST_MATCH, DraftSource, Guess, TextDrafts
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.scheduler.sequence import Sequence
from gptq_api.scheduler.speculation import Speculation
from gptq_api.types import Add, SamplingParams, pack_ids, unpack_ids

NEW_TOKENS = 256
CONTEXTS = (128, 2048)
RIGHT = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
WRONG = 3


class Known:
    """Drafts of a known text, each token right with the same probability."""

    def __init__(self, text: list[int], right: float) -> None:
        rng = random.Random(1)
        self._drafts = [token if rng.random() < right else WRONG for token in text]

    def guess(self, seq: Sequence, most: int) -> Guess | None:
        tokens = self._drafts[seq.num_output_tokens : seq.num_output_tokens + most]
        return Guess(tokens, LONGEST_MATCH, "known") if tokens else None

    def ended(self, seq: Sequence) -> None:
        pass


class CopyEdit:
    """Right where the server's own source would be for somebody who copies a text and changes a fifth of it."""

    def __init__(self, text: list[int], prompt: int = 1024) -> None:
        rng = random.Random(2)
        self._text = text
        source = [rng.randrange(100, 30_000) for _ in range(prompt)]
        answer: list[int] = []
        place = 0
        while len(answer) < len(text):
            copied, changed = rng.randint(8, 32), rng.randint(2, 8)
            answer += source[place : place + copied] + [rng.randrange(100, 30_000) for _ in range(changed)]
            place = (place + copied + changed) % (prompt - 64)
        self._answer = answer
        self._seq = Sequence(0, source, SamplingParams(max_tokens=len(text)))
        self._drafts = TextDrafts()

    def guess(self, seq: Sequence, most: int) -> Guess | None:
        num = seq.num_output_tokens
        replayed = self._seq
        replayed.token_ids += self._answer[replayed.num_output_tokens : num]
        found = self._drafts.guess(replayed, most)
        if found is None:
            return None
        pairs = zip(found.tokens, self._answer[num:], self._text[num:], strict=False)
        tokens = [token if guessed == said else WRONG for guessed, said, token in pairs]
        return Guess(tokens, found.match, found.source) if tokens else None

    def ended(self, seq: Sequence) -> None:
        pass


@dataclass
class Run:
    tokens: list[list[int]]
    seconds: float
    """from the first token to the last"""
    steps: list[tuple[float, int, int]]
    """when each ended, its rows, its tokens"""
    waits: dict[str, float]
    """medians of steps with drafts"""

    @property
    def tokens_per_second(self) -> float:
        return (sum(map(len, self.tokens)) - len(self.tokens)) / self.seconds

    def median_ms(self, rows: int) -> float | None:
        """Of steps of so many rows, from the end of the one before."""
        pairs = zip(self.steps, self.steps[1:], strict=False)
        times = [(after[0] - before[0]) * 1e3 for before, after in pairs if after[1] == before[1] == rows]
        return round(statistics.median(times), 3) if len(times) > 4 else None


class Clocked:
    """A runner, with an event before each launch, before its graph and behind it. A context."""

    def __init__(self, runner: Any, most_steps: int) -> None:
        self._runner, self._graphs, self._replay = runner, runner._graphs, runner._graphs.run
        self._events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(most_steps)]  # type: ignore[no-untyped-call]
        self._rows: list[int] = []
        """of each step with drafts, 0: it has none"""
        self._graph_ms: list[float] = []
        """of each step, what the call took"""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def __enter__(self) -> Clocked:
        self._graphs.run = self._run
        return self

    def __exit__(self, *_: object) -> None:
        del self._graphs.run

    def _run(self, shape: Any, capture: bool = True) -> Any:
        self._events[len(self._rows)][1].record()
        began = time.perf_counter()
        result = self._replay(shape, capture)
        self._graph_ms.append((time.perf_counter() - began) * 1e3)
        return result

    def launch(self, step: Any) -> Any:
        events = self._events[len(self._rows)]
        events[0].record(self._runner._stream)
        launched = self._runner.launch(step)
        events[2].record(self._runner._stream)
        self._rows.append(step.num_tokens if step.drafts else 0)
        return launched

    def medians(self) -> dict[str, float]:
        torch.cuda.synchronize()
        found: dict[str, list[float]] = {"host_ms": [], "launch_ms": [], "device_ms": [], "graph_ms": []}
        steps = list(zip(self._rows, self._events, self._graph_ms, strict=False))
        for (rows_before, before, _), (rows, events, graph_ms) in itertools.pairwise(steps):
            if rows and rows_before:
                found["host_ms"].append(before[2].elapsed_time(events[1]))
                found["launch_ms"].append(events[0].elapsed_time(events[1]))
                found["device_ms"].append(events[1].elapsed_time(events[2]))
                found["graph_ms"].append(graph_ms)
        return {name: round(statistics.median(times), 3) for name, times in found.items() if len(times) > 4}


def run(model: Measured, prompts: list[list[int]], new: int, speculation: Speculation | None) -> Run:
    runner = model.runner
    blocks = BlockManager(runner.num_blocks, runner.block_size)
    scheduler = Scheduler(blocks, 64, 2048, False, speculation=speculation, prompt_costs=runner.prompt_costs)
    with Clocked(runner, 4 * new + 100) as clocked:
        return _run(Engine(clocked, scheduler), clocked, prompts, new)


def _run(engine: Engine[Any], clocked: Clocked, prompts: list[list[int]], new: int) -> Run:
    tokens: list[list[int]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.add(Add(i, pack_ids(prompt), (SamplingParams(max_tokens=new, temperature=0.0),)))
    steps: list[tuple[float, int, int]] = []
    began = 0.0
    while engine.has_work():
        out = engine.step()
        if out is None:
            continue
        ids = unpack_ids(out.sequence_ids)
        for i, token in zip(ids, unpack_ids(out.tokens), strict=True):
            tokens[i].append(token)
        now = time.perf_counter()
        if not began and all(tokens):
            began = now
        steps.append((now, out.stats.num_batched_tokens, len(ids)))
    return Run(tokens, steps[-1][0] - began, steps, clocked.medians())


def measure(model: Measured) -> list[dict[str, Any]]:
    runner, rows = model.runner, list[dict[str, Any]]()
    rng = random.Random(0)

    def compare(name: str, prompts: list[list[int]], new: int, source: DraftSource, plain: Run, **more: Any) -> None:
        most = more.get("rows", runner.max_draft_rows)
        costs = (1e-6,) if "rows" in more else (runner.row_cost, runner.wait_cost, runner.context_cost)
        drafted = run(model, prompts, new, Speculation(source, most, *costs))
        row = {
            "part": name,
            "batch": len(prompts),
            "context": len(prompts[0]),
            **more,
            "tok_s": round(drafted.tokens_per_second, 1),
            "plain_tok_s": round(plain.tokens_per_second, 1),
            "tokens_a_step": round(new * len(prompts) / len(drafted.steps), 2),
            "same_text": drafted.tokens == plain.tokens,
            **drafted.waits,
        }
        if "rows" in more:
            row |= {"step_ms": drafted.median_ms(most), "plain_step_ms": plain.median_ms(1)}
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    for context in CONTEXTS:
        prompts = [[rng.randrange(6, runner.vocab_size) for _ in range(context)]]
        run(model, prompts, 32, Speculation(Known([WRONG] * 32, 0.0), 8, 1e-6))
        plain = run(model, prompts, NEW_TOKENS, None)
        text = plain.tokens[0]
        for most in (2, 4, 8):
            compare("all right", prompts, NEW_TOKENS, Known(text, 1.0), plain, rows=most)
        if context == CONTEXTS[0]:
            for right in RIGHT:
                compare("auto", prompts, NEW_TOKENS, Known(text, right), plain, right=right)
        compare("copy-edit", prompts, NEW_TOKENS, CopyEdit(text), plain)
    for batch in (1, 2, 8, 64):
        prompts = [[rng.randrange(6, runner.vocab_size) for _ in range(128)] for _ in range(batch)]
        plain = run(model, prompts, 128, None)
        nothing = Known([WRONG] * 128, 1.0)
        compare("nothing to guess", prompts, 128, nothing, plain)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthetic", choices=sorted(SHAPES), default="llama-13b")
    parser.add_argument("--commit", help="what was measured, where there is no git")
    parser.add_argument("--out", type=Path, help="folder for drafts-<gpu>.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no benchmark: torch finds no CUDA device")
    copy, multiply = ceilings()
    result = machine(args.commit) | {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "copy_tb_s": round(copy, 3),
        "cublas_tflops": round(multiply, 1),
    }
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = synthetic_checkpoint(args.synthetic, Path(scratch) / "model", group_size=128)
        settings = Settings.model_validate({"model_path": str(checkpoint.folder), "device": "cuda", "max_num_seqs": 64})
        model = Measured("g128", checkpoint, LoadOptions.of(settings))
        names = ("row_cost", "wait_cost", "context_cost")
        result["costs"] = {name: round(getattr(model.runner, name), 6) for name in names}
        print(result["costs"])
        result["rows"] = measure(model)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"drafts-{result['gpu'].lower().replace(' ', '-')}.json"
        models = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(models | {args.synthetic: result}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
