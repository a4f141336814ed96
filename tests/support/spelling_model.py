"""A tiny checkpoint that says what a test tells it to, in a long context: for clients whose prompts are long and whose
next request depends on the answer.

Its attention and its MLP add nothing, so that the next token follows from the last one alone: the head has, in the row
of a token, the embedding of the one before it. What it says is cut into tokens of its own, which are added to the demo
model's vocabulary. It speaks after the last token of a prompt, which its template makes another one after the result of
a tool; all else is a real model with a real cache, and sampling at any usual temperature says the same.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gptq_api import demo
from tests.support.checkpoints import QuantizedModule, Recipe, random_model, write_checkpoint

POSITIONS = 65536
HIDDEN = 128
BASE, END, ASSISTANT, LINE = 2048, 1, 4, 204
"""of the demo model's vocabulary: its size, and its <|end|>, <|assistant|> and line break"""
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>Tools: {% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Call one by <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|end|>{% endif %}'
    "{% for message in messages %}"
    "{{ '<|' ~ (message.role if message.role in ['system', 'user', 'assistant'] else 'system') ~ '|>' }}"
    "{% if message.role == 'tool' %}<tool_response>{{ message.content }}</tool_response>"
    "{% else %}{{ message.content or '' }}{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if messages[-1].role == 'tool' %}{{ '\\n' }}{% endif %}{% endif %}"
)
"""Hermes's way to call, said in the demo model's tokens"""


def write(folder: Path, answer: str, after_tool: str = "Done, as you said.") -> Path:
    """A checkpoint that answers with `answer`, and with `after_tool` where the last message is the result of a tool."""
    source = Path(demo.__file__).parent / "model"
    vocabulary = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    known = {token["content"] for token in vocabulary["added_tokens"]} | set(vocabulary["model"]["vocab"])
    answers = [cut(text, known) for text in (answer, after_tool)]
    pieces = [piece for text in answers for piece in text]
    num_rows = -(-(BASE + len(pieces)) // 64) * 64
    names = [*pieces, *(f"<|unused {i}|>" for i in range(BASE + len(pieces), num_rows))]
    for i, name in enumerate(names, BASE):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        vocabulary["added_tokens"].append({"id": i, "content": name, "special": False, **flags})
    ids = {piece: i for i, piece in enumerate(pieces, BASE)}
    embeddings = torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(1)).sign()
    head = torch.zeros(num_rows, HIDDEN)
    for start, text in zip((ASSISTANT, LINE), answers, strict=True):
        said = [ids[piece] for piece in text]
        for before, token in zip([start, *said], [*said, END], strict=True):
            head[token] += embeddings[before]
    recipe = Recipe(vocab_size=num_rows, hidden_size=HIDDEN, intermediate_size=128, num_layers=1, num_heads=2)
    model = random_model(replace(recipe, num_kv_heads=1, max_position_embeddings=POSITIONS))
    dense = {
        **{name: torch.ones_like(tensor) for name, tensor in model.dense.items() if name.endswith("norm.weight")},
        "model.embed_tokens.weight": embeddings,
        "lm_head.weight": head,
    }
    modules = {name: _silenced(m) if name.endswith(("o_proj", "down_proj")) else m for name, m in model.modules.items()}
    claims = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    write_checkpoint(
        folder, replace(model, dense=dense, modules=modules), quant_config=claims, bos_token_id=0, eos_token_id=END
    )
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"chat_template": TEMPLATE, "model_max_length": POSITIONS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def cut(text: str, known: set[str], length: int = 5) -> list[str]:
    """Into pieces of about `length` characters which are all different, and new; adds them to `known`."""
    pieces: list[str] = []
    while text:
        size = length
        while text[:size] in known and size < len(text):
            size += 1
        if text[:size] in known or len(text) - size < length:
            size = len(text)
        pieces.append(text[:size])
        text = text[size:]
        known.add(pieces[-1])
    return pieces


def _silenced(module: QuantizedModule) -> QuantizedModule:
    """With all weights zero."""
    zeros: Tensor = module.zeros[module.g_idx.long()]
    return replace(module, q=zeros.to(module.q.dtype))
