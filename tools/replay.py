"""Runs the steps of a trace (`gptq-api serve --trace FILE`) again, on this machine and any runner:

    python tools/replay.py trace.jsonl [--device cuda] [--dtype float16] [any flag of the server]

Steps are launched in their order and as far ahead as the runner looks, with no scheduler and no clients, so two commits
or two devices do exactly the same work: drafts are those that were recorded, and a sequence that gets another number of
tokens from them is admitted once more, with what was recorded. Printed are the times beside the recorded ones, and how
many sampled tokens are the same.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from gptq_api.checkpoint.errors import CheckpointError
from gptq_api.config import Settings
from gptq_api.engine.trace import TracedStep, TraceHead, read_trace
from gptq_api.errors import ConfigError
from gptq_api.runner.load import load_runner
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.runner.options import LoadOptions
from gptq_api.settings_source import load_settings
from gptq_api.step import Admission, Masks, NewBlocks, Sampled, Step


class Recorded:
    """What the trace says of the sequences in their seats."""

    def __init__(self) -> None:
        self._admissions: dict[int, Admission] = {}
        self._tokens: dict[int, list[int]] = {}
        self._blocks: dict[int, list[int]] = {}
        self._astray: set[int] = set()
        """seats that the runner knows another text of"""

    def corrected(self, step: Step) -> Step:
        """The step, in which sequences that have gone astray are admitted with their recorded tokens."""
        admitted, new_blocks = list(step.admitted), list(step.new_blocks)
        for new in step.admitted:
            self._admissions[new.seat], self._tokens[new.seat] = new, list(new.token_ids)
            self._blocks[new.seat] = []
            self._astray.discard(new.seat)
        for blocks in step.new_blocks:
            self._blocks[blocks.seat][blocks.first :] = blocks.block_ids
        for seat in self._astray.intersection(step.seats):
            admitted.append(msgspec.structs.replace(self._admissions[seat], token_ids=list(self._tokens[seat])))
            new_blocks = [blocks for blocks in new_blocks if blocks.seat != seat]
            new_blocks.append(NewBlocks(seat, 0, list(self._blocks[seat])))
            self._astray.discard(seat)
        return msgspec.structs.replace(step, admitted=admitted, new_blocks=new_blocks)

    def compare(self, traced: TracedStep, sampled: Sampled) -> int:
        """How many tokens are as recorded."""
        place = replayed = num_same = 0
        for entry, (num, num_now) in enumerate(zip(traced.sampled.num_tokens, sampled.num_tokens, strict=True)):
            tokens, now = traced.sampled.tokens[place : place + num], sampled.tokens[replayed : replayed + num_now]
            place, replayed = place + num, replayed + num_now
            num_same += sum(a == b for a, b in zip(tokens, now, strict=False))
            self._tokens[traced.step.seats[entry]] += tokens
            if entry in traced.step.drafts and tokens != now:
                self._astray.add(traced.step.seats[entry])
        return num_same


def replay(runner: LoadedRunner, steps: Iterable[TracedStep]) -> dict[str, Any]:
    """Launch and collect every step; what came of it."""
    in_flight: deque[tuple[float, TracedStep, Any]] = deque()
    recorded: list[float] = []
    replayed: list[float] = []
    num_tokens = num_same = 0
    known = Recorded()
    began = time.perf_counter()

    def collect() -> None:
        nonlocal num_tokens, num_same
        started, traced, launched = in_flight.popleft()
        sampled = runner.collect(launched)
        recorded.append(traced.total_ms)
        replayed.append((time.perf_counter() - started) * 1e3)
        num_tokens += len(traced.sampled.tokens)
        num_same += known.compare(traced, sampled)

    constrained: dict[int, bool] = {}  # by seat
    for traced in steps:
        constrained |= {new.seat: bool(new.params.grammar) for new in traced.step.admitted}
        while in_flight and (traced.step.drafts or in_flight[-1][1].step.drafts):
            collect()  # as the engine did: drafts follow known tokens
        launched = runner.launch(known.corrected(traced.step))
        in_flight.append((time.perf_counter(), traced, launched))
        masks = recorded_masks(traced, constrained, runner.vocab_size)
        if masks is not None:
            if len(in_flight) > 1:
                collect()
            runner.draw(launched, masks)
        if len(in_flight) > runner.lookahead:
            collect()
    while in_flight:
        collect()
    return {
        "steps": len(recorded),
        "tokens": num_tokens,
        "same_tokens": num_same,
        "median_ms": round(statistics.median(replayed), 3) if replayed else None,
        "recorded_median_ms": round(statistics.median(recorded), 3) if recorded else None,
        "seconds": round(time.perf_counter() - began, 3),
    }


def recorded_masks(traced: TracedStep, constrained: dict[int, bool], vocab_size: int) -> Masks | None:
    """Instead of a grammar: each of its entries gets the token that it got."""
    step, place, entries, tokens = traced.step, 0, list[int](), list[int]()
    for entry, num in enumerate(traced.sampled.num_tokens):
        if constrained.get(step.seats[entry]) and step.num_sampled[entry]:
            entries.append(entry)
            tokens.append(max(traced.sampled.tokens[place], 0))
        place += num
    if not entries:
        return None
    words = np.zeros((len(entries), -(-vocab_size // 32)), np.uint32)
    for row, token in zip(words, tokens, strict=True):
        row[token // 32] |= np.uint32(1 << token % 32)
    return Masks(entries, words.view(np.int32))


def settings_of(head: TraceHead, flags: list[str]) -> Settings:
    """Flags, and for what they do not say what the trace was recorded with."""
    given = {flag.split("=", 1)[0] for flag in flags}
    sizes = {
        "--block-size": head.block_size,
        "--num-blocks": head.num_blocks,
        "--max-num-seqs": head.max_num_seqs,
        "--model-path": head.model_path,
    }
    more = [item for name, value in sizes.items() if name not in given for item in (name, str(value))]
    return load_settings(Settings, [*flags, *more], prog="replay.py FILE")


def main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if args else 2
    try:
        head, steps = read_trace(Path(args[0]))
        settings = settings_of(head, args[1:])
        result = replay(load_runner(LoadOptions.of(settings)), steps)
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"replay.py: {error}", file=sys.stderr)
        return 1
    except msgspec.MsgspecError as error:
        print(f"replay.py: {args[0]} is not a trace of this version: {error}", file=sys.stderr)
        return 1
    print(msgspec.json.encode(result).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
