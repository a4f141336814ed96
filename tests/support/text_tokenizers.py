"""Tiny tokenizers of the four kinds, trained here with the libraries that real ones were trained with."""

from __future__ import annotations

import base64
import io
import json
from functools import cache
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog. Once upon a time there was a little model.",
    "A chat between a curious user and an artificial intelligence assistant. USER: Hello! ASSISTANT: Hi!",
    "Übung macht den Meister; naïve café, привет мир, 你好世界, こんにちは, 👋🏽 🤖 done.",
    "    indented code:\n\tfor i in range(10):\n        print(i)\n\n",
    "It's 1234567 tokens, they'll count; don't they?  Two  spaces.",
] * 4
LLAMA_3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
DEMO_SPECIAL = ["<|bos|>", "<|eos|>", "<|user|>", "<|end|>"]


def byte_level(folder: Path, special: list[str] = DEMO_SPECIAL) -> Path:
    """tokenizer.json as Llama 3 and Qwen have it, small; its first two special tokens are BOS and EOS."""
    (folder / "tokenizer.json").write_text(_byte_level_json(tuple(special)))
    config = {"bos_token": special[0], "eos_token": {"content": special[1]}, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@cache
def _byte_level_json(special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer.to_str()


def llama_json(folder: Path) -> Path:
    """tokenizer.json as converted LLaMA 1 and 2 tokenizers have it: ▁, byte fallback, a Strip in the decoder."""
    (folder / "tokenizer.json").write_text(_llama_json())
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@cache
def _llama_json() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=control + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False
    )
    words = [word for line in TEXT[:2] for word in line.split()]
    tokenizer.train_from_iterator(words * 4, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in control]
    return json.dumps(state)


def spm(folder: Path, **config: object) -> Path:
    """tokenizer.model as LLaMA 1 and 2 have it."""
    (folder / "tokenizer.model").write_bytes(_spm_model())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@cache
def _spm_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXT for line in text.splitlines() if line.strip()]),
        model_writer=model,
        model_type="bpe",
        vocab_size=460,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return model.getvalue()


def tiktoken_ranks() -> list[bytes]:
    """Token bytes by rank: the 256 bytes, then merges in the order they were learnt."""
    alphabet = {char: byte for byte, char in _alphabet().items()}
    vocabulary = json.loads(_byte_level_json(()))["model"]["vocab"]
    tokens = [bytes(alphabet[char] for char in token) for token in sorted(vocabulary, key=vocabulary.__getitem__)]
    return [bytes([byte]) for byte in range(256)] + [token for token in tokens if len(token) > 1]


def tiktoken(folder: Path) -> Path:
    """tokenizer.model as Meta publishes it for Llama 3."""
    lines = (base64.b64encode(token) + b" " + str(rank).encode() for rank, token in enumerate(tiktoken_ranks()))
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def _alphabet() -> dict[int, str]:
    """GPT-2's byte stand-ins, found by asking the library instead of our own table."""
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    table = {}
    for code in range(256):
        encoded = encoder.pre_tokenize_str(chr(code))[0][0]
        for byte, char in zip(chr(code).encode(), encoded, strict=True):
            table[byte] = char
    for lead in [*range(0xC2, 0xF5)]:  # lead bytes of longer characters
        code = {2: (lead & 0x1F) << 6, 3: (lead & 0x0F) << 12 | 0x800, 4: (lead & 7) << 18 | 0x10000}[
            2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        ]
        if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            code = {0xED: 0xD000, 0xF4: 0x100000}.get(lead, 0x1000)
        for byte, char in zip(chr(code).encode(), encoder.pre_tokenize_str(chr(code))[0][0], strict=True):
            table[byte] = char
    missing = [byte for byte in range(256) if byte not in table]  # never in UTF-8: C0, C1, F5..FF
    taken = set(table.values())
    spare = [char for char in pre_tokenizers.ByteLevel.alphabet() if char not in taken]
    return table | dict(zip(missing, sorted(spare), strict=True))


KINDS = {"byte-level": byte_level, "llama-json": llama_json, "sentencepiece": spm, "tiktoken": tiktoken}
