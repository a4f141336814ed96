"""A checkpoint's token ids and what they stand for: all that can be done with a tokenizer but encoding.

Every token stands for exact bytes: decoding is concatenating them, which is what makes streaming (`text/stream.py`)
exact and O(1) per token. It is a table and no library, so whoever serves requests can have it while the tokenizer
itself, which a checkpoint brought, runs elsewhere (`text/worker.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import msgspec

from gptq_api.errors import UserError

_MAX_NAME = 64


class NoRowError(UserError):
    """A text holds a token that the model's embedding has no row for; half a sentence with the id and its text."""


class TokenTable(msgspec.Struct, frozen=True):
    """What a tokenizer's ids are."""

    contents: list[str]
    """by id, as in the vocabulary: "▁the", "Ġthe", "<0x0A>", "<|eot_id|>"; "" for unused ids"""
    pieces: list[bytes]
    """by id, the bytes a token stands for, which need not be whole characters; b"" for control tokens and unused ids"""
    special: dict[int, str]
    """control tokens: id -> content"""
    bos_token_id: int | None
    eos_token_id: int | None
    adds_bos: bool
    strips_leading_space: bool
    separator: bytes = b""
    """what decoding puts in front of every token, control tokens included"""


class Tokens:
    """`vocab_size` counts the tokenizer's ids. The model's embedding may have more rows, and those ids stand for
    nothing; or fewer, and texts that need the others are refused (`check_rows`)."""

    def __init__(self, table: TokenTable) -> None:
        self.table = table
        self._contents, self._pieces, self._special = table.contents, table.pieces, table.special
        self.vocab_size = len(table.contents)
        self.bos_token_id = table.bos_token_id
        self.eos_token_id = table.eos_token_id
        self.adds_bos = table.adds_bos
        """whether this model's prompts begin with BOS"""
        self.strips_leading_space = table.strips_leading_space
        """decoding drops one space at the very start of a text, which encoding had put there"""
        self.special_token_ids = frozenset(self._special)
        self._special_ids = {content: i for i, content in self._special.items()}
        contents = sorted(self._special_ids, key=len, reverse=True)
        self.special_pattern = re.compile("|".join(map(re.escape, contents)) if contents else r"(?!)")
        """matches the control tokens in a text, longest first"""

    @property
    def special_contents(self) -> list[str]:
        """What the control tokens are called in the vocabulary."""
        return list(self._special_ids)

    @cached_property
    def max_token_bytes(self) -> int:
        """UTF-8 bytes of the longest token: so many bytes are at least so many tokens."""
        return max(map(len, self._pieces), default=0)

    def split_special(self, text: str) -> list[str | int]:
        """Text -> plain texts and the ids of the control tokens between them."""
        parts: list[str | int] = []
        end = 0
        for match in self.special_pattern.finditer(text):
            parts += [text[end : match.start()], self._special_ids[match[0]]]
            end = match.end()
        parts.append(text[end:])
        return [part for part in parts if part != ""]

    def with_bos(self, ids: list[int]) -> list[int]:
        """The prompt with exactly one BOS in front, or as it is for models that use none."""
        if not self.adds_bos or self.bos_token_id is None:
            return ids
        start = 0
        while start < len(ids) and ids[start] == self.bos_token_id:
            start += 1
        return [self.bos_token_id, *ids[start:]]

    def end_ids(self, named: Sequence[int], num_rows: int, of_turns: Sequence[int] = ()) -> tuple[int, ...]:
        """The ids that end a text: those the model's config names, this tokenizer's EOS, and a chat template's ends of
        turns; no id that a model of so many rows cannot produce. Where a config calls our BOS an end (LLaMA-1
        conversions of 2023: bos 0, eos 1 for what is <s>), it is wrong."""
        wrong = {self.bos_token_id} - {self.eos_token_id}
        ends = [token_id for token_id in named if token_id not in wrong]
        if self.eos_token_id is not None:
            ends.append(self.eos_token_id)
        return tuple(dict.fromkeys(token_id for token_id in (*ends, *of_turns) if token_id < num_rows))

    def check_rows(self, ids: Sequence[int], num_rows: int) -> None:
        """Raises NoRowError where the model has no row for one of the ids: tokens were added to the tokenizer alone, or
        the vocabulary was cut."""
        if not ids or max(ids) < num_rows:
            return
        token_id = next(token_id for token_id in ids if token_id >= num_rows)
        text = self.piece(token_id, skip_special=False).decode("utf-8", "replace")[:_MAX_NAME]
        shown = f" ({text!r})" if text else ""
        raise NoRowError(f"the model has no row for token id {token_id}{shown}; it has {num_rows}")

    def without_rows(self, num_rows: int) -> str | None:
        """What to tell whoever starts a model of so many rows, where some tokens have none."""
        num = sum(1 for content in self._contents[num_rows:] if content)
        if not num:
            return None
        ids, them = ("id", "it") if num == 1 else ("ids", "them")
        return f"the tokenizer has {num} {ids} that the model has no row for; prompts that need {them} are refused"

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. Control tokens are left out or written as they
        are called in the vocabulary. One leading space is dropped where this tokenizer's encoding adds one."""
        data = b"".join(self.piece(token_id, skip_special=skip_special) for token_id in ids)
        if self.strips_leading_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; b"" for control tokens and ids that stand for nothing."""
        return self._pieces[token_id] if 0 <= token_id < self.vocab_size else b""

    def piece(self, token_id: int, *, skip_special: bool) -> bytes:
        """`token_bytes`, and for control tokens their name unless they are skipped."""
        if not skip_special and token_id in self._special:
            return self.table.separator + self._special[token_id].encode()
        return self.token_bytes(token_id)

    def id_to_token(self, token_id: int) -> str:
        """As in the vocabulary; "" for ids that stand for nothing."""
        return self._contents[token_id] if 0 <= token_id < self.vocab_size else ""

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    @cached_property
    def _ids(self) -> dict[str, int]:
        ids = {content: i for i, content in reversed(list(enumerate(self._contents))) if content}
        return ids | self._special_ids
