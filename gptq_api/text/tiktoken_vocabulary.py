"""tokenizer.model of Llama 3: a tiktoken rank file, turned into what tokenizer.json of the same model would hold."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from gptq_api.text.json_vocabulary import JsonVocabulary, build, byte_level_alphabet
from gptq_api.text.tokenizer_config import TokenizerConfig, TokenizerError, read_file

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NUM_SPECIAL = 256
_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
"""offset behind the ranks -> name, as Llama 3.1 to 3.3 use it; in 3.0 the ones it lacks are reserved and never made"""


def is_tiktoken(path: Path) -> bool:
    """Rank files are text lines `base64 rank`; sentencepiece models are protobuf."""
    return _rank(read_file(path).partition(b"\n")[0][:1024]) is not None


def load(path: Path, config: TokenizerConfig) -> JsonVocabulary:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_file(path).splitlines(), 1):
        if not line:
            continue
        entry = _rank(line)
        if entry is None:
            raise TokenizerError(f"{path} is damaged at line {number}: copy it again from the original model")
        ranks[entry[0]] = entry[1]
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise TokenizerError(f"{path} is incomplete ({len(ranks)} ranks): copy it again from the original model")
    return build(_tokenizer_json(ranks, config), config, origin=str(path))


def _rank(line: bytes) -> tuple[bytes, int] | None:
    parts = line.split()
    if len(parts) != 2 or not parts[1].isdigit():
        return None
    try:
        return base64.b64decode(parts[0], validate=True), int(parts[1])
    except binascii.Error:
        return None


def _tokenizer_json(ranks: dict[bytes, int], config: TokenizerConfig) -> dict[str, Any]:
    """Ranks -> BPE merges: every split of a token into two tokens is a merge, as urgent as the token's rank."""
    alphabet = byte_level_alphabet()
    written = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(left, right) for left, right in splits if left in ranks and right in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges.extend((written[left], written[right]) for left, right in known)
    names = _special_names(len(ranks), config)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token_id, content in names.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {written[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def _special_names(base: int, config: TokenizerConfig) -> dict[int, str]:
    names: dict[int, str] = {}
    reserved = 0
    for offset in range(_NUM_SPECIAL):
        if offset in _NAMED:
            names[base + offset] = _NAMED[offset]
        else:
            names[base + offset] = f"<|reserved_special_token_{reserved}|>"
            reserved += 1
    return names | {token_id: token.content for token_id, token in config.added.items() if token_id in names}
