"""The demo model's tokenizer: byte-level BPE with digits as single tokens, learnt from the generated chats.

python -m demo_model.tokenizer --out FOLDER
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from demo_model.data import records

SPECIAL = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>")
BEGIN, END, PAD = 0, 1, 5
VOCAB_SIZE = 2048
MAX_LENGTH = 1024
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'system' if message['role'] == 'developer' else message['role'] %}"
    "{% if role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('The demo model knows the roles system, user and assistant, not ' ~ role) }}{% endif %}"
    "{{ '<|' ~ role ~ '|>' ~ (message['content'] | trim) ~ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def texts(items: list[dict[str, Any]]) -> Iterator[str]:
    """The texts of `records`, without control tokens. Other scripts are left out: they stay bytes, and an emoji or a
    CJK character is several tokens, which is what a stream has to get right."""
    for item in items:
        for text in [item["text"]] if "text" in item else [m["content"] for m in item["messages"]]:
            yield "".join(c for c in text if ord(c) < 128)


def train(seed: int = 1, num: int = 40_000) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(records(seed, num)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BEGIN]} $A", special_tokens=[(SPECIAL[BEGIN], BEGIN)]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def config() -> dict[str, Any]:
    """tokenizer_config.json"""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BEGIN],
        "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[PAD],
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
        "additional_special_tokens": [t for i, t in enumerate(SPECIAL) if i not in (BEGIN, END, PAD)],
        "chat_template": CHAT_TEMPLATE,
    }


def save(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config(), indent=2) + "\n")


def segments(item: dict[str, Any]) -> list[tuple[str, bool]]:
    """A record as the pieces of what the chat template renders: (text, whether the model should write it)."""
    if "text" in item:
        return [(SPECIAL[BEGIN], False), (item["text"] + SPECIAL[END], True)]
    pieces = [(SPECIAL[BEGIN], False)]
    for message in item["messages"]:
        pieces.append((f"<|{message['role']}|>", False))
        pieces.append((message["content"] + SPECIAL[END], message["role"] == "assistant"))
    return pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json and tokenizer_config.json")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num", type=int, default=40_000, help="generated records to learn from")
    args = parser.parse_args()
    save(train(args.seed, args.num), args.out)


if __name__ == "__main__":
    main()
