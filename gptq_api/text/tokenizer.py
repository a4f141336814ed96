"""Text to token ids, for every kind of tokenizer a LLaMA checkpoint comes with.

Text is encoded with control tokens recognised only where the caller says so, so that what a user types stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from gptq_api.on_disk import is_there
from gptq_api.text import tiktoken_vocabulary
from gptq_api.text.json_vocabulary import JsonVocabulary
from gptq_api.text.spm_vocabulary import SpmVocabulary
from gptq_api.text.tokenizer_config import TokenizerConfig, TokenizerError, read_json, read_tokenizer_config
from gptq_api.text.tokens import Tokens, TokenTable

__all__ = ["Tokenizer", "TokenizerError", "load_tokenizer"]

MAX_IDS = 2**22
"""of a tokenizer; no model has a tenth of it"""
MAX_CONTROL_CHARS = 1024


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


class Tokenizer(Tokens):
    """One checkpoint's tokenizer. Encoding may be called from any thread."""

    def __init__(
        self, vocabulary: Vocabulary, *, bos: str | None, eos: str | None, adds_bos: bool, origin: str = "the tokenizer"
    ) -> None:
        """Raises TokenizerError where `origin` declares an absurd id or control token."""
        self._vocabulary = vocabulary
        if vocabulary.vocab_size > MAX_IDS:
            raise TokenizerError(
                f"{origin} declares the token id {vocabulary.vocab_size - 1}, which is beyond {MAX_IDS}: copy it again "
                "from the original model"
            )
        bos_id, eos_id = (None if name is None else vocabulary.token_to_id(name) for name in (bos, eos))
        contents = [vocabulary.id_to_token(token_id) for token_id in range(vocabulary.vocab_size)]
        ends = {token_id: vocabulary.id_to_token(token_id) for token_id in (bos_id, eos_id) if token_id is not None}
        special = {token_id: content for token_id, content in (vocabulary.special | ends).items() if content}
        if (longest := max(map(len, special.values()), default=0)) > MAX_CONTROL_CHARS:
            raise TokenizerError(
                f"{origin} declares a control token of {longest} characters, more than {MAX_CONTROL_CHARS}: copy it "
                "again from the original model"
            )
        super().__init__(
            TokenTable(
                contents=contents,
                pieces=[
                    b"" if token_id in special else vocabulary.token_bytes(token_id)
                    for token_id in range(vocabulary.vocab_size)
                ],
                special=special,
                bos_token_id=bos_id,
                eos_token_id=eos_id,
                adds_bos=adds_bos and bos_id is not None,
                strips_leading_space=vocabulary.strips_leading_space,
                separator=vocabulary.separator,
            )
        )

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
        return Tokenizer(vocabulary, bos=bos, eos=eos, adds_bos=config.add_bos is not False, origin=str(model_file))
    spm = SpmVocabulary.load(model_file, config)
    return Tokenizer(
        spm,
        bos=_known(spm, roles.get("bos_token")) or spm.bos,
        eos=_known(spm, roles.get("eos_token")) or spm.eos,
        adds_bos=config.add_bos is not False,
        origin=str(model_file),
    )


def _from_json(vocabulary: JsonVocabulary, config: TokenizerConfig, folder: Path) -> Tokenizer:
    bos = _known(vocabulary, config.roles.get("bos_token")) or _from_config_id(vocabulary, folder, "bos_token_id")
    eos = _known(vocabulary, config.roles.get("eos_token")) or _from_config_id(vocabulary, folder, "eos_token_id")
    # LlamaTokenizerFast rebuilds the post-processor from its own default, so there the file's says nothing
    llama_class = config.tokenizer_class.startswith(("LlamaTokenizer", "CodeLlamaTokenizer"))
    adds_bos = config.add_bos if config.add_bos is not None else llama_class or vocabulary.adds_bos
    return Tokenizer(vocabulary, bos=bos, eos=eos, adds_bos=adds_bos, origin=str(folder / "tokenizer.json"))


def _known(vocabulary: Vocabulary, content: str | None) -> str | None:
    return content if content is not None and vocabulary.token_to_id(content) is not None else None


def _from_config_id(vocabulary: Vocabulary, folder: Path, key: str) -> str | None:
    """The model's config.json names special tokens by id; asked only when the tokenizer's own files are silent."""
    value = read_json(folder / "config.json").get(key)
    token_id = value[0] if isinstance(value, list) and value else value
    return (vocabulary.id_to_token(token_id) or None) if isinstance(token_id, int) else None
