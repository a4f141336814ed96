"""Tokens a second of the demo (or `--model`) on the CPU with drafts and without, one chat at a time, from its first
token on; and what rows cost a step, which the CPU runner's `row_cost` is from.

    python benchmarks/speculation.py --out benchmarks/results/speculation-cpu.json

Each chat is asked with `--speculate off` and `auto` in turns, of engines in this process and of servers over HTTP, as a
stream; medians are told, and answers have to be the same. Chats: questions of the README and their like, each for the
first time and once more (within a cache salt); text at a high temperature, which repeats nothing; copies: a question
that the chat has an answer to already, and one whose answer is predicted, a fifth of its words being others, together
or one by one. What is accepted in the copies says how such a text is copied, not how often the model repeats itself.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve import machine

from gptq_api.engine.core import Engine
from gptq_api.runner.cpu.runner import MAX_DRAFT_ROWS, CpuRunner
from gptq_api.runner.load import load_runner
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.solo import Solo, step_of
from gptq_api.scheduler.blocks import BlockManager
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.scheduler.speculation import speculation_of
from gptq_api.text.chat_template import load_chat_template
from gptq_api.text.folder import checkpoint_folder
from gptq_api.text.tokenizer import load_tokenizer
from gptq_api.types import Add, SamplingParams, pack_ids, unpack_ids

QUESTIONS = (
    "What is GPTQ?",
    "Count from 1 to 10.",
    "Who are you?",
    "What is gptq-api?",
    "Count from 1 to 30.",
    "Tell me a story about a fox.",
    "What is continuous batching?",
)
LONG_ANSWERS = ("What is GPTQ?", "What is gptq-api?", "What is continuous batching?", "Tell me a story about a fox.")
MAX_TOKENS = 150
NUM_BLOCKS = 400


@dataclass(frozen=True)
class Chat:
    messages: list[dict[str, str]]
    salt: str
    prediction: str = ""
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    seconds: float
    """from the first token to the end"""
    num_tokens: int
    """after the first"""
    said: str | list[int]
    """what has to be the same"""


class InProcess:
    """An engine on a runner that others use in turns."""

    def __init__(self, runner: CpuRunner, model: str, speculate: Any) -> None:
        self.tokenizer = load_tokenizer(checkpoint_folder(model))
        self._template = load_chat_template(checkpoint_folder(model), self.tokenizer)
        speculation = speculation_of(speculate, runner)
        scheduler = Scheduler(BlockManager(NUM_BLOCKS, runner.block_size), 8, 512, speculation=speculation)
        self._engine, self._runner, self._num_asked = Engine(runner, scheduler), runner, 0

    def ask(self, chat: Chat) -> Answer:
        engine, tokens = self._engine, list[int]()
        prompt = self._template.render(chat.messages, add_generation_prompt=True)
        params = SamplingParams(
            max_tokens=MAX_TOKENS,
            temperature=chat.temperature,
            seed=chat.seed,
            stop_token_ids=tuple(self._runner.eos_token_ids),
        )
        predicted = pack_ids(self.tokenizer.encode(chat.prediction) if chat.prediction else [])
        self._num_asked += 1
        began, first = 0.0, 0
        engine.add(Add(self._num_asked, pack_ids(prompt), (params,), chat.salt.encode(), prediction=predicted))
        while engine.has_work():
            output = engine.step()
            assert output is not None
            tokens += unpack_ids(output.tokens)
            if not began and tokens:
                began, first = time.perf_counter(), len(tokens)
        return Answer(time.perf_counter() - began, len(tokens) - first, tokens)

    def drafted(self) -> tuple[int, int]:
        """(tokens that were drafted, of these accepted) in total."""
        stats = self._engine.stats()
        return stats.num_draft_tokens, stats.num_accepted_tokens

    def close(self) -> None:
        pass


class Server:
    """`gptq-api serve`, asked over one connection."""

    def __init__(self, model: str, speculate: str, options: list[str]) -> None:
        command = [sys.executable, "-m", "gptq_api", "serve", model, "--port", "0", "--speculate", speculate, *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        for line in self.process.stderr:
            if "http://" in line and "/v1" in line:
                port = int(line.split("http://")[1].split("/")[0].rsplit(":", 1)[1])
                break
        else:
            raise SystemExit("the server did not start")
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def ask(self, chat: Chat) -> Answer:
        body = {"messages": chat.messages, "cache_salt": chat.salt, "temperature": chat.temperature, "seed": chat.seed}
        body |= {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": MAX_TOKENS}
        if chat.prediction:
            body["prediction"] = {"type": "content", "content": chat.prediction}
        data = json.dumps(body)
        self._connection.request("POST", "/v1/chat/completions", data, {"content-type": "application/json"})
        answer = self._connection.getresponse()
        began, lines = 0.0, []
        for line in answer:
            if not began and b'"content":"' in line and b'"content":""' not in line:
                began = time.perf_counter()
            lines.append(line)
        seconds = time.perf_counter() - began
        assert answer.status == 200, lines
        chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
        return Answer(seconds, chunks[-1]["usage"]["completion_tokens"] - 1, text)

    def drafted(self) -> tuple[int, int]:
        self._connection.request("GET", "/metrics")
        lines = self._connection.getresponse().read().decode().splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if line.startswith("vllm:spec_decode"))
        named = {name.partition("{")[0]: float(value) for name, value in found.items()}
        names = ("num_draft_tokens", "num_accepted_tokens")
        drafted, accepted = (int(named[f"vllm:spec_decode_{name}_total"]) for name in names)
        return drafted, accepted

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def chats(answers: dict[str, str], turn: int) -> dict[str, list[Chat]]:
    """By kind, in their order. `answers`: to the questions; each turn has salts of its own."""
    asked = {question: [{"role": "user", "content": question}] for question in QUESTIONS}
    first = [Chat(asked[question], f"{turn}") for question in QUESTIONS]
    story, own = [{"role": "user", "content": "Tell me a story."}], iter(range(1000))
    return {
        "questions": first,
        "questions again": first,
        "repeats nothing": [Chat(story, f"{turn}/{next(own)}", temperature=2.0, seed=i) for i in range(4)],
        "copy of an earlier answer": [
            Chat([*asked[q], {"role": "assistant", "content": answers[q]}, *asked[q]], f"{turn}/{next(own)}")
            for q in LONG_ANSWERS
        ],
        "predicted, a fifth of the words others, together": [
            Chat(asked[q], f"{turn}/{next(own)}", changed(answers[q], lambda part: 0.4 <= part < 0.6))
            for q in LONG_ANSWERS
        ],
        "predicted, every fifth word another": [
            Chat(asked[q], f"{turn}/{next(own)}", " ".join(_every_fifth(answers[q].split(" ")))) for q in LONG_ANSWERS
        ],
    }


def changed(text: str, where: Callable[[float], bool]) -> str:
    words = text.split(" ")
    return " ".join("elsewhere" if where(i / len(words)) else word for i, word in enumerate(words))


def _every_fifth(words: list[str]) -> list[str]:
    return ["elsewhere" if i % 5 == 4 else word for i, word in enumerate(words)]


def compare(where: str, off: InProcess | Server, auto: InProcess | Server, rounds: int, model: str) -> list[Any]:
    texts = load_tokenizer(checkpoint_folder(model))
    rates = defaultdict[tuple[str, str], list[float]](list)  # of all chats of a kind together, by round
    tokens, drafted, accepted = (defaultdict[str, int](int) for _ in range(3))
    answers: dict[str, str] = {}
    for question in QUESTIONS:
        said = off.ask(Chat([{"role": "user", "content": question}], "before")).said
        answers[question] = said if isinstance(said, str) else texts.decode(said)
    for turn in range(-2, rounds):  # two that do not count
        for kind, asked in chats(answers, turn).items():
            before, spent = auto.drafted(), {"off": 0.0, "auto": 0.0}
            num = 0
            for i, chat in enumerate(asked):
                got = {}
                for name, engine in (
                    (("off", off), ("auto", auto)) if (turn + i) % 2 else (("auto", auto), ("off", off))
                ):
                    got[name] = engine.ask(chat)
                    spent[name] += got[name].seconds
                assert got["off"].said == got["auto"].said
                num += got["off"].num_tokens
            after = auto.drafted()
            if turn >= 0:
                for name, seconds in spent.items():
                    rates[kind, name].append(num / seconds)
                tokens[kind] += num + len(asked)
                drafted[kind] += after[0] - before[0]
                accepted[kind] += after[1] - before[1]
    rows = []
    for kind, num in tokens.items():
        pairs = list(zip(rates[kind, "off"], rates[kind, "auto"], strict=True))
        rows.append(
            {
                "where": where,
                "chats": kind,
                "tokens": num // rounds,
                "off_tok_s": round(statistics.median(rate for rate, _ in pairs)),
                "auto_tok_s": round(statistics.median(rate for _, rate in pairs)),
                "ratio": round(statistics.median(rate / plain for plain, rate in pairs), 3),
                "drafted_share": round(drafted[kind] / num, 3),
                "accepted_share": round(accepted[kind] / num, 3),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def load(model: str) -> CpuRunner:
    runner = load_runner(LoadOptions(model_path=model, device="cpu", num_blocks=NUM_BLOCKS))
    assert isinstance(runner, CpuRunner)
    return runner


def row_costs(runner: CpuRunner, model: str, context: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step of one sequence by its rows, head included; in turns, medians."""
    solo = Solo([5] * (context + MAX_DRAFT_ROWS), SamplingParams(max_tokens=1, temperature=0.0), list(range(99)))
    runner.logits(step_of([solo], [context]))
    times = defaultdict[int, list[float]](list)
    for _ in range(rounds):
        for num_rows in range(1, MAX_DRAFT_ROWS + 1):
            solo.num_computed_tokens = context
            step = step_of([solo], [num_rows])
            began = time.perf_counter()
            runner.logits(step, every_row=True)
            times[num_rows].append(time.perf_counter() - began)
    medians = {rows: statistics.median(found) * 1e3 for rows, found in times.items()}
    return {
        "model": Path(model).name,
        "context": context,
        "weights_mib": round(runner.weight_bytes / 2**20),
        "step_ms": {rows: round(ms, 3) for rows, ms in medians.items()},
        "more_per_row": round((medians[MAX_DRAFT_ROWS] / medians[1] - 1) / (MAX_DRAFT_ROWS - 1), 3),
        "row_cost": runner.row_cost,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows-of", nargs="*", default=["demo"], help="models whose rows are measured")
    parser.add_argument("--no-http", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("options", nargs="*", help="of the servers, behind --")
    args = parser.parse_args()
    gc.disable()
    result: dict[str, Any] = {"machine": machine(), "load_average": os.getloadavg(), "model": args.model}
    result |= {"rounds": args.rounds, "rows": [row_costs(load(name), name, 256, 40) for name in args.rows_of]}
    print(json.dumps(result["rows"]), flush=True)
    runner = load(args.model)
    engines = [InProcess(runner, args.model, speculate) for speculate in ("off", "auto")]
    result["chats"] = compare("in process", engines[0], engines[1], args.rounds, args.model)
    if not args.no_http:
        servers = [Server(args.model, speculate, args.options) for speculate in ("off", "auto")]
        try:
            result["chats"] += compare("HTTP", servers[0], servers[1], args.rounds, args.model)
        finally:
            for server in servers:
                server.close()
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
