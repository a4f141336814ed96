"""What activations rounded to int8 change on the CPU, beside --dtype bfloat16 and float32: perplexity, greedy answers,
logits.

    python benchmarks/accuracy.py --out benchmarks/results/accuracy-cpu.json
    python benchmarks/accuracy.py --checkpoints FOLDER ... --text stories.txt --out ...     # and these
    python benchmarks/accuracy.py --page                        # docs/measurements.md, from that file

The demo answers the questions and chats of tests/ greedily; its perplexity is that of those same chats and answers, and
of a text unlike what it learned (LICENSE). Random checkpoints of every layout in tests/support/layouts.py: how far
logits of 64 random tokens are from those of float32, in shares of their norm, and how often the best token is another.
Checkpoints that are named: perplexity on the text, and greedy continuations of 100 pieces of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # questions, chats and layouts are those of the tests

import torch
from agreement import answers
from pages import MEASUREMENTS, ROOT, Part
from serve import machine
from torch import Tensor

from gptq_api.bench.measure import measure
from gptq_api.bench.row import Dtype, Job
from gptq_api.config import Settings
from gptq_api.model.config import read_config
from gptq_api.runner.load import load_runner
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.solo import Solo, step_of
from gptq_api.settings_source import load_settings
from gptq_api.text.chat_template import load_chat_template
from gptq_api.text.folder import checkpoint_folder
from gptq_api.text.samples import encode_documents, read_documents, spread, windows
from gptq_api.text.tokenizer import load_tokenizer
from gptq_api.types import SamplingParams
from tests.support.checkpoints import random_model
from tests.support.layouts import LAYOUTS

DTYPES: tuple[Dtype, ...] = ("auto", "bfloat16", "float32")
"""auto rounds to int8; float32 is what the others are held against"""
RESULT = ROOT / "benchmarks" / "results" / "accuracy-cpu.json"
PART = Part(MEASUREMENTS, "accuracy", "benchmarks/accuracy.py")
LONGEST_ANSWER = 128
CONTINUED, PIECE, CONTINUATION = 100, 32, 60
"""pieces of a text, tokens of each, and tokens that follow"""

Chat = list[dict[str, str]]


def demo_chats() -> list[Chat]:
    """Every question and chat of the tests, with the answers they expect."""
    questions = json.loads((ROOT / "tests" / "demo_questions.json").read_text())
    asked = [
        [{"role": "user", "content": q["question"]}, {"role": "assistant", "content": q["exact"]}] for q in questions
    ]
    chats: list[Chat] = json.loads((ROOT / "tests" / "demo_chats.json").read_text())
    return asked + chats


def prompts_of(chats: list[Chat]) -> tuple[list[list[int]], list[str]]:
    """(what the demo sees before each answer, the answer that the tests expect)."""
    folder = checkpoint_folder("demo")
    template = load_chat_template(folder, load_tokenizer(folder))
    found = [
        (template.render(chat[:i], add_generation_prompt=True), turn["content"])
        for chat in chats
        for i, turn in enumerate(chat)
        if turn["role"] == "assistant"
    ]
    return [prompt for prompt, _ in found], [answer for _, answer in found]


def texts_of(answers_found: list[list[int]]) -> list[str]:
    """What the demo said."""
    tokenizer = load_tokenizer(checkpoint_folder("demo"))
    return [
        tokenizer.decode([token for token in answer if token not in tokenizer.special_token_ids]).strip()
        for answer in answers_found
    ]


def perplexity(model: str, text: Path, dtype: Dtype, num_windows: int | None = None) -> dict[str, Any]:
    """As `gptq-api bench` measures it."""
    folder = checkpoint_folder(model)
    limit = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    row = measure(
        Job(
            name=model,
            folder=str(folder),
            kind="gptq",
            ckpt=None,
            text=str(text),
            context=min(limit, 512),
            num_windows=num_windows,
            prompt_tokens=1,
            num_tokens=1,
            device="cpu",
            dtype=dtype,
            num_threads=torch.get_num_threads(),
            batches=[1],
        )
    )
    return {"perplexity": round(row.perplexity or 0.0, 5), "tokens": row.perplexity_tokens}


def continued(model: str, dtype: Dtype, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy answers."""
    flags = ["--device", "cpu", "--dtype", dtype, "--no-enable-prefix-caching", "--max-queued-requests", "1000"]
    ends = read_config(checkpoint_folder(model)).eos_token_ids
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=ends)
    settings = load_settings(Settings, [model, *flags])
    found, _ = asyncio.run(answers(settings, prompts, [params] * len(prompts), 8))
    return [tokens for tokens, _ in found]


def agreement(found: list[list[int]], exact: list[list[int]]) -> dict[str, Any]:
    """With float32's: answers that are the same to the end, and tokens before the first other one."""
    same = sum(a == b for a, b in zip(found, exact, strict=True))
    before = sum(_before_the_first_other(a, b) for a, b in zip(found, exact, strict=True))
    return {
        "answers": len(exact),
        "same_answers": round(same / len(exact), 4),
        "same_tokens": round(before / sum(map(len, exact)), 4),
    }


def _before_the_first_other(found: list[int], exact: list[int]) -> int:
    for i, (a, b) in enumerate(zip(found, exact, strict=False)):
        if a != b:
            return i
    return min(len(found), len(exact))


def demo_rows() -> list[dict[str, Any]]:
    chats = demo_chats()
    prompts, expected = prompts_of(chats)
    found = {dtype: continued("demo", dtype, prompts, LONGEST_ANSWER) for dtype in DTYPES}
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "chats.jsonl"
        file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        return [
            {
                "model": "demo",
                "dtype": dtype,
                "chats": perplexity("demo", file, dtype),
                "other_text": perplexity("demo", ROOT / "LICENSE", dtype),
                "as_expected": sum(a == b for a, b in zip(texts_of(found[dtype]), expected, strict=True)),
            }
            | agreement(found[dtype], found["float32"])
            for dtype in DTYPES
        ]


def checkpoint_rows(folder: Path, text: Path) -> list[dict[str, Any]]:
    tokenizer, rows = load_tokenizer(folder), json.loads((folder / "config.json").read_text())["vocab_size"]
    pieces = windows(encode_documents(read_documents(text), text, tokenizer, None, rows), PIECE)
    whole = [piece for piece in pieces if len(piece) == PIECE]
    prompts = spread(whole, min(CONTINUED, len(whole)))
    exact = continued(str(folder), "float32", prompts, CONTINUATION)
    return [
        {
            "model": folder.name,
            "dtype": dtype,
            "text": text.name,
            "given_text": perplexity(str(folder), text, dtype, 200),
        }
        | agreement(continued(str(folder), dtype, prompts, CONTINUATION), exact)
        for dtype in DTYPES
    ]


def logits_of(folder: Path, dtype: Dtype, token_ids: list[int]) -> Tensor:
    """float32 [tokens, V]."""
    options = LoadOptions(model_path=str(folder), device="cpu", dtype=dtype, num_threads=1, max_num_seqs=1)
    solo = Solo(token_ids, SamplingParams(max_tokens=1), block_table=list(range(4)))
    logits, _ = load_runner(options).logits(step_of([solo], [len(token_ids)]), every_row=True)
    return logits


def layout_rows() -> list[dict[str, Any]]:
    errors: dict[Dtype, list[float]] = {dtype: [] for dtype in DTYPES}
    same: dict[Dtype, list[float]] = {dtype: [] for dtype in DTYPES}
    with tempfile.TemporaryDirectory() as work:
        for i, layout in enumerate(LAYOUTS.values()):
            folder = Path(work) / str(i)
            layout.write(folder, random_model(layout.recipe))
            drawn = random.Random(i)
            ids = [drawn.randrange(layout.recipe.vocab_size) for _ in range(64)]
            exact = logits_of(folder, "float32", ids)
            for dtype in DTYPES:
                found = logits_of(folder, dtype, ids)
                errors[dtype].append(float((found - exact).norm() / exact.norm()))
                same[dtype].append(float((found.argmax(1) == exact.argmax(1)).float().mean()))
    return [
        {
            "model": "random weights",
            "dtype": dtype,
            "layouts": len(LAYOUTS),
            "logits_error": round(statistics.median(errors[dtype]), 6),
            "logits_error_worst": round(max(errors[dtype]), 6),
            "same_best_token": round(statistics.fmean(same[dtype]), 4),
        }
        for dtype in DTYPES
    ]


def paragraph(result: dict[str, Any]) -> str:
    """For docs/measurements.md."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        rows.setdefault(row["model"], {})[row["dtype"]] = row
    named = [by for name, by in rows.items() if name not in ("demo", "random weights")]
    lines = ["| against float32 | int8 activations (auto) | bfloat16 |", "|---|---|---|"]

    def line(what: str, told: Callable[[str], str]) -> None:
        lines.append(f"| {what} | {told('auto')} | {told('bfloat16')} |")

    def by_ppl(by: dict[str, dict[str, Any]], key: str) -> Callable[[str], str]:
        exact = by["float32"][key]["perplexity"]
        return lambda dtype: f"{by[dtype][key]['perplexity']:.4f} ({by[dtype][key]['perplexity'] / exact - 1:+.2%})"

    demo, layouts = rows["demo"], rows["random weights"]
    for key, what in (("chats", "its own questions and chats"), ("other_text", "a text unlike its own")):
        told = demo["float32"][key]
        line(f"demo: perplexity of {what}, {told['tokens']:,} tokens, {told['perplexity']:.4f}", by_ppl(demo, key))
    line(
        f"demo: {demo['float32']['answers']} greedy answers, the same; those the tests expect "
        f"({demo['float32']['as_expected']})",
        lambda dtype: f"{demo[dtype]['same_answers']:.1%}; {demo[dtype]['as_expected']}",
    )
    if named:

        def share(dtype: str, key: str) -> float:
            return statistics.fmean(by[dtype][key] for by in named)

        def change(dtype: str) -> str:
            logs = [
                math.log(by[dtype]["given_text"]["perplexity"] / by["float32"]["given_text"]["perplexity"])
                for by in named
            ]
            mean, least, most = (math.expm1(value) for value in (statistics.fmean(logs), min(logs), max(logs)))
            return f"{mean:+.2%}, {least:+.2%} to {most:+.2%}"

        line(f"{len(named)} small trained checkpoints: perplexity, mean and range", change)
        line(
            f"their greedy continuations of {CONTINUATION} tokens, the same",
            lambda dtype: f"{share(dtype, 'same_answers'):.1%}, {share(dtype, 'same_tokens'):.1%} of tokens",
        )
    line(
        f"random weights in {layouts['auto']['layouts']} layouts: error of logits, median and worst",
        lambda dtype: f"{layouts[dtype]['logits_error']:.2%}, {layouts[dtype]['logits_error_worst']:.2%}",
    )
    line("their best token of each row, the same", lambda dtype: f"{layouts[dtype]['same_best_token']:.1%}")
    about = result["machine"]
    return f"{about['cpu']}, {about['date']}, commit {about['commit']}:\n\n" + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", nargs="*", type=Path, default=[], help="GPTQ folders, measured on --text")
    parser.add_argument("--text", type=Path, help="what those checkpoints know")
    parser.add_argument("--commit", help="what was measured, where there is no git")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", action="store_true", help="write docs/measurements.md and measure nothing")
    args = parser.parse_args()
    if args.page:
        PART.write(paragraph(json.loads(RESULT.read_text())))
        return 0
    if args.checkpoints and args.text is None:
        parser.error("--checkpoints are measured on a text: name it by --text FILE")
    rows = demo_rows()
    for folder in args.checkpoints:
        rows += checkpoint_rows(folder, args.text)
    result = {"machine": machine(args.commit), "rows": rows + layout_rows()}
    print(paragraph(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
