"""Small unquantized models with a tokenizer, as folders: trained for seconds on the project's own prose, or random."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from gptq_api.demo import DEMO_PATH
from gptq_api.text.tokenizer import load_tokenizer
from tests.support.checkpoints import Recipe, random_model, write_checkpoint

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "LICENSE"
"""what the trained model has seen: 11 KB"""


def add_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(DEMO_PATH) / name, folder / name)
    return folder


def vocab_size() -> int:
    return int(json.loads((Path(DEMO_PATH) / "config.json").read_text())["vocab_size"])


def perplexity(model: Any, texts: list[list[int]]) -> float:
    """Of every token but the first of each text, by a model of transformers."""
    total, num = 0.0, 0
    with torch.no_grad():
        for ids in texts:
            logits = model(torch.tensor([ids])).logits[0, :-1]
            total += float(functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
            num += len(ids) - 1
    return math.exp(total / num)


def train(folder: Path, *, num_layers: int = 2, num_steps: int = 100) -> Path:
    """A LLaMA of about 300,000 weights that has learnt TEXT, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(Path(DEMO_PATH))
    ids = torch.tensor(tokenizer.encode(TEXT.read_text(), add_bos=True))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size(),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.9))
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / num_steps)
        starts = torch.randint(len(ids) - 64, (8,))
        batch = torch.stack([ids[start : start + 64] for start in starts])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return add_tokenizer(folder)


def random_folder(folder: Path, *, container: str = "safetensors", **config: Any) -> Path:
    """Random weights, float16, hidden 64; `config` overrides config.json and goes with tensors of its own."""
    recipe = Recipe(vocab_size=vocab_size(), dense=("proj",), max_position_embeddings=128)
    write_checkpoint(folder, random_model(recipe), container=container, **config)
    return add_tokenizer(folder)
