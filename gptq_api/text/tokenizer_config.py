"""What the small files beside a tokenizer say: its special tokens, whether prompts begin with BOS, "legacy" spacing.

Read from tokenizer_config.json, special_tokens_map.json and added_tokens.json. Nothing in these files is ever executed:
`auto_map` and `tokenizer_class` name code that is not loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from gptq_api.errors import UserError
from gptq_api.on_disk import cannot_be_read, is_there, unreadable, without_mark

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_MARKER = re.compile(r"<\|[^\s]+\|>")


class TokenizerError(UserError):
    """The tokenizer cannot be used: one sentence with the file, what is missing in it, and the remedy."""


@dataclass(frozen=True)
class AddedToken:
    content: str
    special: bool


@dataclass(frozen=True)
class TokenizerConfig:
    """The side files, digested. Absent facts stay None: each tokenizer kind has its own defaults."""

    roles: dict[str, str] = field(default_factory=dict)
    """bos_token, eos_token ... -> content, where given and not empty (decapoda's LLaMA-1 uploads give "")"""
    added: dict[int, AddedToken] = field(default_factory=dict)
    """token id -> token beyond (or flagged within) the base vocabulary"""
    special: frozenset[str] = frozenset()
    """contents that are declared special anywhere"""
    add_bos: bool | None = None
    legacy: bool | None = None
    tokenizer_class: str = ""


def is_marker(content: str) -> bool:
    """`<|im_start|>` and its like are control tokens even where a file declares `"special": false`, as several do."""
    return _MARKER.fullmatch(content) is not None


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Never fails for absent files; raises TokenizerError for one that is not a JSON object."""
    config = read_json(folder / "tokenizer_config.json")
    special_map = read_json(folder / "special_tokens_map.json")
    added: dict[int, AddedToken] = {}
    for content, token_id in read_json(folder / "added_tokens.json").items():
        if isinstance(token_id, int):
            added[token_id] = AddedToken(content, is_marker(content))
    decoder = config.get("added_tokens_decoder")
    for key, value in (decoder if isinstance(decoder, dict) else {}).items():
        if key.isdigit() and (name := _content(value)):
            special = isinstance(value, dict) and value.get("special") is True
            added[int(key)] = AddedToken(name, special or is_marker(name))
    roles = {role: found for role in ROLES if (found := _content(config.get(role)) or _content(special_map.get(role)))}
    extra = config.get("additional_special_tokens") or special_map.get("additional_special_tokens") or []
    extras = [found for value in (extra if isinstance(extra, list) else []) if (found := _content(value))]
    return TokenizerConfig(
        roles=roles,
        added=added,
        special=frozenset(extras) | frozenset(roles.values()),
        add_bos=_flag(config.get("add_bos_token")),
        legacy=_flag(config.get("legacy")),
        tokenizer_class=str(config.get("tokenizer_class") or ""),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where the file is absent. Raises TokenizerError naming the file."""
    if not is_there(path):
        return {}
    try:
        value = msgspec.json.decode(read_file(path))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TokenizerError(f"{path} is not readable JSON ({error}): copy it again from the original model") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds no JSON object: copy it again from the original model")
    return value


def read_file(path: Path) -> bytes:
    """Its content without a byte order mark. TokenizerError where it cannot be had."""
    sentence = unreadable(path)
    if sentence is not None:
        raise TokenizerError(sentence)
    try:
        return without_mark(path.read_bytes())
    except OSError as error:
        raise TokenizerError(cannot_be_read(path, error)) from None


def _content(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None
