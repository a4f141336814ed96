"""Asks a checkpoint questions and reports how many answers are right, greedily and at temperature 0.7.

    python -m demo_model.evaluate FOLDER

FOLDER is a float checkpoint or a GPTQ one (which is dequantised). "exact" questions come from tests/demo_questions.json
and tests/demo_chats.json, "held out" ones, which the generator does not ask, from demo_model/phrases/held_out.json;
what newcomers ask is held out as well: tests/demo_newcomers.json, demo_model/phrases/held_out_newcomers.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from demo_model.dataset import Chats
from demo_model.known import NEWCOMERS, PHRASES
from demo_model.tokenizer import END, PAD, SPECIAL

FILES = {
    "questions": NEWCOMERS.with_name("demo_questions.json"),
    "chats": NEWCOMERS.with_name("demo_chats.json"),
    "held_out": PHRASES / "held_out.json",
    "newcomers": NEWCOMERS,
    "newcomers_held_out": PHRASES / "held_out_newcomers.json",
}
SETS = tuple(FILES)
EXACT = ("questions", "chats")


def questions(name: str) -> list[dict[str, Any]]:
    """Each has "messages" (ending with the user's) and "exact", or "expect" (strings the answer has, all of them), or
    "any" (it has one of them), "none" (it has none of them) and maybe "dangerous" (a wrong answer could hurt)."""
    raw = json.loads(FILES[name].read_text(encoding="utf-8"))
    if name == "chats":
        return [
            {"messages": turns[:i], "exact": turn["content"]}
            for turns in raw
            for i, turn in enumerate(turns)
            if turn["role"] == "assistant"
        ]
    for item in raw:
        item["messages"] = [*item.get("before", ()), {"role": "user", "content": item["question"]}]
    items: list[dict[str, Any]] = raw
    return items


def prompt(messages: list[dict[str, str]]) -> str:
    """What the chat template renders."""
    return SPECIAL[0] + "".join(f"<|{m['role']}|>{m['content'].strip()}<|end|>" for m in messages) + "<|assistant|>"


@torch.inference_mode()
def answer(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    prompts: list[str],
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 420,
) -> list[str]:
    """The model's answers to rendered prompts, computed in one batch."""
    encoded = [tokenizer.encode(p, add_special_tokens=False).ids for p in prompts]
    width = max(map(len, encoded))
    device = model.device
    ids = torch.tensor([[PAD] * (width - len(e)) + e for e in encoded], device=device)
    mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded], device=device)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    out = model.generate(  # type: ignore[misc]
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=END,
        pad_token_id=PAD,
        **sampling,
    )
    rows = [row[: row.index(END)] if END in row else row for row in out[:, width:].tolist()]
    return tokenizer.decode_batch(rows, skip_special_tokens=True)


def right(item: dict[str, Any], text: str) -> bool:
    if "exact" in item:
        return bool(text == item["exact"])
    text = text.lower()

    def has(word: str) -> bool:
        return word.lower() in text

    found = any(map(has, item["any"])) if "any" in item else all(map(has, item["expect"]))
    return found and not any(map(has, item.get("none", ())))


@torch.inference_mode()
def certainty(model: LlamaForCausalLM, tokenizer: Tokenizer, item: dict[str, Any], temperature: float) -> float:
    """The probability that sampling at `temperature` gives exactly item["exact"], computed and not sampled."""
    before = tokenizer.encode(prompt(item["messages"]), add_special_tokens=False).ids
    wanted = [*tokenizer.encode(item["exact"], add_special_tokens=False).ids, END]
    ids = torch.tensor([before + wanted[:-1]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(before) - 1 :].float()
    chosen = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(wanted, device=model.device)[:, None])
    return float(chosen.sum().exp())


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, chats: Chats, max_rows: int = 1000) -> float:
    """Over the tokens that the model writes, float32."""
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    order = chats.lengths[:max_rows].argsort()
    for rows in order.split(32):
        ids, written = chats.batch(rows, int(chats.lengths[rows].max()))
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        ours = written[:, 1:].flatten() == 1
        total += losses[ours].double().sum().cpu()
        count += int(ours.sum())
    return float((total / count).exp())


def report(
    model: LlamaForCausalLM, tokenizer: Tokenizer, samples: int = 4, sets: tuple[str, ...] = SETS
) -> dict[str, dict[str, Any]]:
    """Prints the share of right answers and the wrong ones; `samples` answers per question above temperature 0. Returns
    for every set the numbers and the wrong answers at temperature 0, as JSON has them."""
    found: dict[str, dict[str, Any]] = {}
    for name in sets:
        items = questions(name)
        found[name] = {"questions": len(items)}
        if name in EXACT:
            for temperature in (0.7, 1.0):
                sure = [certainty(model, tokenizer, item, temperature) for item in items]
                at = items[sure.index(min(sure))]["messages"][-1]["content"]
                found[name][f"least chance at {temperature}"] = min(sure)
                print(f"{name}: chance of the exact answer at {temperature}: least {min(sure):.4f} ({at})", flush=True)
        prompts = [prompt(item["messages"]) for item in items]
        for temperature, runs in ((0.0, 1), (0.7, samples), (1.0, samples)):
            total = len(items) * runs
            if not total:
                continue
            texts = answer(model, tokenizer, prompts * runs, temperature, max_new_tokens=420 if name in EXACT else 120)
            pairs = [(i, text) for i, text in zip(items * runs, texts, strict=True) if not right(i, text)]
            found[name][f"right at {temperature}"] = f"{total - len(pairs)} of {total}"
            print(f"{name}: temperature {temperature}: {total - len(pairs)} of {total} right", flush=True)
            if temperature:
                found[name][f"dangerous at {temperature}"] = sum(bool(i.get("dangerous")) for i, _ in pairs)
                continue
            found[name]["wrong"] = [
                {"question": i["messages"][-1]["content"], "answer": text, "dangerous": bool(i.get("dangerous"))}
                for i, text in pairs
            ]
            for line in found[name]["wrong"]:
                print(f"  {'DANGEROUS ' * line['dangerous']}{line['question']!r} -> {line['answer']!r}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=4, help="answers per question above temperature 0")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--held-out-seed", type=int, default=1_000_001, help="seed of the chats for the perplexity")
    parser.add_argument("--json", type=Path, help="file for the numbers and the wrong answers")
    args = parser.parse_args()
    from demo_model.quantize import load_float  # not above: the machine that trains need not have gptq_api installed

    tokenizer_json = args.folder / "tokenizer.json"
    model = load_float(args.folder).eval()
    chats = Chats.generate(tokenizer_json, args.held_out_seed, 1000, torch.device("cpu"))
    print(f"held-out perplexity {perplexity(model, chats, 300):.4f}", flush=True)
    found = report(model, Tokenizer.from_file(str(tokenizer_json)), args.samples, tuple(args.sets))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
