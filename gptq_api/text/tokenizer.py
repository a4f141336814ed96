"""Text to token ids and back, for every kind of tokenizer a LLaMA checkpoint comes with.

Two rules hold for all of them. Text is encoded with control tokens recognised only where the caller says so, so that
what a user types stays text. And every token stands for exact bytes: decoding is concatenating
them, which is what makes streaming (`text/stream.py`) exact and O(1) per token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from gptq_api.errors import UserError
from gptq_api.on_disk import is_there
from gptq_api.text import tiktoken_vocabulary
from gptq_api.text.json_vocabulary import JsonVocabulary
from gptq_api.text.spm_vocabulary import SpmVocabulary
from gptq_api.text.tokenizer_config import TokenizerConfig, TokenizerError, read_json, read_tokenizer_config

__all__ = ["NoRowError", "Tokenizer", "TokenizerError", "load_tokenizer"]

_MAX_NAME = 64


class NoRowError(UserError):
    """A text holds a token that the model's embedding has no row for; half a sentence with the id and its text."""


class Vocabulary(Protocol):
    """What the two libraries have in common."""

    vocab_size: int
    special: dict[int, str]
    """control tokens: id -> content"""
    strips_leading_space: bool
    """decoding drops one space at the very start of a text, which encoding had put there"""

    separator: bytes
    """what decoding puts in front of every token, control tokens included"""

    def encode_plain(self, text: str, *, continues: bool = False) -> list[int]: ...
    def encode_parsed(self, text: str) -> list[int] | None: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, token_id: int) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class Tokenizer:
    """One checkpoint's tokenizer. Encoding may be called from any thread.

    `vocab_size` counts the tokenizer's ids. The model's embedding may have more rows, and those ids stand for nothing;
    or fewer, and texts that need the others are refused (`check_rows`).
    """

    def __init__(self, vocabulary: Vocabulary, *, bos: str | None, eos: str | None, adds_bos: bool) -> None:
        self._vocabulary = vocabulary
        self._pieces: dict[int, bytes] = {}
        self.vocab_size = vocabulary.vocab_size
        self.strips_leading_space = vocabulary.strips_leading_space
        self._separator = vocabulary.separator
        self.bos_token_id = None if bos is None else vocabulary.token_to_id(bos)
        self.eos_token_id = None if eos is None else vocabulary.token_to_id(eos)
        self.adds_bos = adds_bos and self.bos_token_id is not None
        """whether this model's prompts begin with BOS"""
        ends = {i: vocabulary.id_to_token(i) for i in (self.bos_token_id, self.eos_token_id) if i is not None}
        self._special = {i: content for i, content in (vocabulary.special | ends).items() if content}
        self.special_token_ids = frozenset(self._special)
        self._special_ids = {content: i for i, content in self._special.items()}
        contents = sorted(self._special_ids, key=len, reverse=True)
        self.special_pattern = re.compile("|".join(map(re.escape, contents)) if contents else r"(?!)")
        """matches the control tokens in a text, longest first"""

    def encode(self, text: str, *, add_bos: bool = False, parse_special: bool = False) -> list[int]:
        """`add_bos`: as this model's prompts begin, so nothing where they begin without BOS, and never twice.
        `parse_special` is for text that is ours, such as a template's; False keeps `</s>` five characters long."""
        ids: list[int] | None
        if not parse_special:
            ids = self._plain(text)
        elif (ids := self._vocabulary.encode_parsed(text)) is None:
            ids = self.encode_parts(self.split_special(text))
        return self.with_bos(ids) if add_bos else ids

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Plain texts and token ids in the order of the prompt."""
        ids: list[int] = []
        for i, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids.extend(self._plain(part, continues=i > 0))
        return ids

    @property
    def special_contents(self) -> list[str]:
        """What the control tokens are called in the vocabulary."""
        return list(self._special_ids)

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
        num = sum(1 for token_id in range(num_rows, self.vocab_size) if self.id_to_token(token_id))
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
        """The bytes a token stands for, which need not be whole characters; b"" for control tokens and unused ids."""
        data = self._pieces.get(token_id)
        if data is None:
            data = b"" if token_id in self.special_token_ids else self._vocabulary.token_bytes(token_id)
            self._pieces[token_id] = data
        return data

    def piece(self, token_id: int, *, skip_special: bool) -> bytes:
        """`token_bytes`, and for control tokens their name unless they are skipped."""
        if not skip_special and token_id in self._special:
            return self._separator + self._special[token_id].encode()
        return self.token_bytes(token_id)

    def id_to_token(self, token_id: int) -> str:
        """As in the vocabulary: "▁the", "Ġthe", "<0x0A>", "<|eot_id|>"; "" for unused ids."""
        return self._vocabulary.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self._vocabulary.token_to_id(token)

    def _plain(self, text: str, *, continues: bool = False) -> list[int]:
        ids = self._vocabulary.encode_plain(text, continues=continues)
        match = self.special_pattern.search(text)
        if match is None or {self._special_ids[name] for name in self.special_pattern.findall(text)}.isdisjoint(ids):
            return ids
        # The vocabulary's own merges lead to a control token: encode its name in two halves.
        if len(match[0]) == 1:
            return [token_id for token_id in ids if token_id not in self.special_token_ids]
        middle = match.start() + 1
        return self._plain(text[:middle], continues=continues) + self._plain(text[middle:], continues=True)


def load_tokenizer(model_path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder: tokenizer.json, else tokenizer.model (sentencepiece or Llama 3's tiktoken).

    Raises TokenizerError. Nothing is downloaded and no code from the folder is run.
    """
    config = read_tokenizer_config(model_path)
    roles = config.roles
    json_path, model_file = model_path / "tokenizer.json", model_path / "tokenizer.model"
    if is_there(json_path):
        return _from_json(JsonVocabulary.load(json_path, config), config, model_path)
    if not is_there(model_file):
        raise TokenizerError(
            f"{model_path} holds neither tokenizer.json nor tokenizer.model: copy one from the original model"
        )
    if tiktoken_vocabulary.is_tiktoken(model_file):
        vocabulary = tiktoken_vocabulary.load(model_file, config)
        bos, eos = roles.get("bos_token", "<|begin_of_text|>"), roles.get("eos_token", "<|end_of_text|>")
        return Tokenizer(vocabulary, bos=bos, eos=eos, adds_bos=config.add_bos is not False)
    spm = SpmVocabulary.load(model_file, config)
    return Tokenizer(
        spm,
        bos=_known(spm, roles.get("bos_token")) or spm.bos,
        eos=_known(spm, roles.get("eos_token")) or spm.eos,
        adds_bos=config.add_bos is not False,
    )


def _from_json(vocabulary: JsonVocabulary, config: TokenizerConfig, folder: Path) -> Tokenizer:
    bos = _known(vocabulary, config.roles.get("bos_token")) or _from_config_id(vocabulary, folder, "bos_token_id")
    eos = _known(vocabulary, config.roles.get("eos_token")) or _from_config_id(vocabulary, folder, "eos_token_id")
    # LlamaTokenizerFast rebuilds the post-processor from its own default, so there the file's says nothing
    llama_class = config.tokenizer_class.startswith(("LlamaTokenizer", "CodeLlamaTokenizer"))
    adds_bos = config.add_bos if config.add_bos is not None else llama_class or vocabulary.adds_bos
    return Tokenizer(vocabulary, bos=bos, eos=eos, adds_bos=adds_bos)


def _known(vocabulary: Vocabulary, content: str | None) -> str | None:
    return content if content is not None and vocabulary.token_to_id(content) is not None else None


def _from_config_id(vocabulary: Vocabulary, folder: Path, key: str) -> str | None:
    """The model's config.json names special tokens by id; asked only when the tokenizer's own files are silent."""
    value = read_json(folder / "config.json").get(key)
    token_id = value[0] if isinstance(value, list) and value else value
    return (vocabulary.id_to_token(token_id) or None) if isinstance(token_id, int) else None
