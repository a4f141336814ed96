"""Trains the demo model from nothing: tokenizer, chats, a LLaMA of 13 M parameters; some seven minutes on one H200.

    python -m demo_model.train --out FOLDER --max-minutes 5.5

FOLDER receives a Hugging Face checkpoint in float16 (config.json, sharded safetensors, tokenizer), and evaluation.json:
how the questions that demo_model/evaluate.py names were answered. Without a GPU it ends at once; `--device cpu` is for
trying it out.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from demo_model import tokenizer as tok
from demo_model.dataset import Chats
from demo_model.evaluate import SETS, perplexity, questions, report

OTHERS_WEIGHT = 0.05
"""loss weight of the tokens that the user writes"""


def model_config(size: str) -> LlamaConfig:
    """`demo` is what ships; `tiny` only tries the scripts out."""
    hidden, layers, heads, kv_heads, ffn = {"demo": (384, 8, 6, 2, 1024), "tiny": (128, 2, 2, 1, 256)}[size]
    return LlamaConfig(
        vocab_size=tok.VOCAB_SIZE,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        intermediate_size=ffn,
        max_position_embeddings=tok.MAX_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tok.BEGIN,
        eos_token_id=tok.END,
        pad_token_id=tok.PAD,
    )


def optimizer(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    """Weight decay on the matrices of the layers, none on norms and embeddings."""
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda)


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, written: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weighted mean loss, mean loss over the tokens that the model writes), nats per token."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    flags = written[:, 1:].flatten()
    ours = (flags == 1).float()
    weights = ours + (flags == 0) * OTHERS_WEIGHT
    return (losses * weights).sum() / weights.sum(), (losses.detach() * ours).sum() / ours.sum()


def train(model: LlamaForCausalLM, chats: Chats, args: argparse.Namespace) -> dict[str, float]:
    """Warm-up, then cosine to zero over whichever of --steps and --max-minutes ends first."""
    adam = optimizer(model, args.lr)
    device = next(model.parameters()).device
    begin = time.monotonic()
    step = num_tokens = 0
    recent: list[torch.Tensor] = []
    for ids, written in chats.epochs(args.tokens_per_batch, args.seed):
        progress = max(step / args.steps, (time.monotonic() - begin) / (60 * args.max_minutes))
        if progress >= 1:
            break
        lr = args.lr * min((step + 1) / 200, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in adam.param_groups:
            group["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, ours = loss_of(model, ids, written)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        step += 1
        num_tokens += ids.numel()
        recent.append(ours)
        if step % args.log_every == 0:
            mean = torch.stack(recent).mean().item()
            recent = []
            seconds = time.monotonic() - begin
            print(
                f"step {step} loss {mean:.4f} lr {lr:.2e} {num_tokens / seconds / 1e3:.0f}k tok/s {seconds:.0f} s",
                flush=True,
            )
    final = torch.stack(recent).mean().item() if recent else mean
    return {"steps": step, "tokens": num_tokens, "seconds": time.monotonic() - begin, "loss": final}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--size", choices=("demo", "tiny"), default="demo")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to keep; otherwise one is learnt")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--records", type=int, default=1_200_000, help="chats to generate")
    parser.add_argument("--steps", type=int, default=20_000, help="at most so many steps")
    parser.add_argument("--max-minutes", type=float, default=5.5, help="at most so long")
    parser.add_argument("--tokens-per-batch", type=int, default=32_768)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--log-every", type=int, default=200)
    parser.add_argument("--shard-mb", type=int, default=14, help="largest file written, MB")
    parser.add_argument("--samples", type=int, default=2, help="answers per question above temperature 0, at the end")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for trying it out")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --size tiny --records 2000 --steps 20 tries the scripts out")
    if (minutes := args.max_minutes) <= 0 or args.records < 1 or args.steps < 1:
        parser.error(f"--max-minutes {minutes}, --records {args.records} and --steps {args.steps} have to be positive")
    if args.tokenizer is not None and not args.tokenizer.is_file():
        parser.error(f"--tokenizer {args.tokenizer}: there is no such file")
    for name in SETS:
        questions(name)  # what is missing is missing now, and not when all is trained
    began = time.monotonic()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device(args.device)

    tok.save(tok.train() if args.tokenizer is None else Tokenizer.from_file(str(args.tokenizer)), args.out)
    tokenizer_json = args.out / "tokenizer.json"
    chats = Chats.generate(tokenizer_json, args.seed, args.records, device)
    held_out = Chats.generate(tokenizer_json, args.seed + 1_000_000, min(args.records, 1000), device)
    print(
        f"{len(chats.lengths)} chats, {len(chats.ids)} tokens, ready after {time.monotonic() - began:.0f} s", flush=True
    )

    model = LlamaForCausalLM(model_config(args.size)).to(device)  # type: ignore[arg-type]
    result = train(model, chats, args)
    model.half()
    model.save_pretrained(args.out, max_shard_size=f"{args.shard_mb}MB")
    print(f"trained: {json.dumps(result)}, saved after {time.monotonic() - began:.0f} s", flush=True)

    model.float().eval()
    found: dict[str, Any] = {"training": result, "perplexity": perplexity(model, held_out)}
    print(f"held-out perplexity {found['perplexity']:.4f}", flush=True)
    found |= report(model, Tokenizer.from_file(str(tokenizer_json)), args.samples)
    (args.out / "evaluation.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"done after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
