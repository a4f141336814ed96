"""tokenizer.json: the `tokenizers` library encodes; the bytes of each token are read off the file's own decoder."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer

from gptq_api.text.tokenizer_config import TokenizerConfig, TokenizerError, is_marker, read_file

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class _Head(msgspec.Struct):
    """The parts of tokenizer.json that are read here; the vocabulary, most of the file, is skipped over."""

    decoder: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None


class JsonVocabulary:
    """A `tokenizers.Tokenizer` whose text can be encoded with and without its special tokens being recognised."""

    def __init__(self, tokenizer: Tokenizer, head: _Head, config: TokenizerConfig, *, origin: str) -> None:
        tokenizer.no_truncation()  # a limit saved by some training script would silently shorten prompts
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # one object serves both ways of encoding, by a flag on it
        self._decoding = _Decoding.of(head.decoder, origin)
        self.strips_leading_space = self._decoding.strips_leading_space
        self.separator = self._decoding.separator
        added = tokenizer.get_added_tokens_decoder()
        declared = config.special | {token.content for token in config.added.values() if token.special}
        self.special = {
            token_id: token.content
            for token_id, token in added.items()
            if token.special or is_marker(token.content) or token.content in declared
        }
        for content in config.roles.values():
            if (token_id := tokenizer.token_to_id(content)) is not None:
                self.special[token_id] = content
        self._added = {token_id: token.content for token_id, token in added.items()}
        lax = [
            AddedToken(content, special=True, normalized=False)
            for token_id, content in self.special.items()
            if token_id not in added or not added[token_id].special
        ]
        tokenizer.add_special_tokens(lax)
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        self._first_only = self._prefix_first_only(head.pre_tokenizer)

    @classmethod
    def load(cls, path: Path, config: TokenizerConfig) -> JsonVocabulary:
        try:
            data = read_file(path)
            return cls(Tokenizer.from_buffer(data), msgspec.json.decode(data, type=_Head), config, origin=str(path))
        except TokenizerError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(
                f"{path} is not a tokenizer the tokenizers library reads ({error}): copy it from the original model"
            ) from None

    @property
    def adds_bos(self) -> bool:
        """Whether the file's post-processor puts a token in front of the text."""
        return len(self._tokenizer.encode("", add_special_tokens=True).ids) > 0

    def encode_plain(self, text: str, *, continues: bool = False) -> list[int]:
        """Special tokens in `text` stay text. `continues`: `text` follows a token of the same prompt."""
        tokenizer = self._first_only if continues and self._first_only is not None else self._tokenizer
        return self._encode(tokenizer, text, plain=True)

    def encode_parsed(self, text: str) -> list[int]:
        return self._encode(self._tokenizer, text, plain=False)

    def _encode(self, tokenizer: Tokenizer, text: str, *, plain: bool) -> list[int]:
        with self._lock:
            tokenizer.encode_special_tokens = plain
            return tokenizer.encode(text, add_special_tokens=False).ids

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, token_id: int) -> str:
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        return "" if token is None else token

    def token_bytes(self, token_id: int) -> bytes:
        content = self._added.get(token_id)
        return self._decoding.token_bytes(self.id_to_token(token_id), added=content is not None)

    def _prefix_first_only(self, pre_tokenizer: Mapping[str, Any] | None) -> Tokenizer | None:
        """The same tokenizer without the leading-space rule, for text after the first piece of a prompt.

        Needed only for `"prepend_scheme": "first"`; with a Prepend normalizer or "always", every piece gets the prefix.
        """
        if not any(part.get("prepend_scheme") == "first" for part in _parts(pre_tokenizer, "pretokenizers")):
            return None
        state = msgspec.json.decode(self._tokenizer.to_str())
        for part in _parts(state["pre_tokenizer"], "pretokenizers"):
            if part.get("prepend_scheme") == "first":
                part["prepend_scheme"] = "never"
        return Tokenizer.from_buffer(msgspec.json.encode(state))


class _Decoding:
    """token string -> bytes, for the decoders LLaMA tokenizers are published with.

    ByteLevel (Llama 3, Qwen), the sequence Replace / ByteFallback / Fuse / Strip (LLaMA 1 and 2, Mistral), Metaspace.
    Where the file has none, the library joins the tokens by spaces.
    """

    def __init__(self) -> None:
        self.byte_level = False
        self.byte_fallback = False
        self.strips_leading_space = False
        self.separator = b""
        self.replacements: list[tuple[str, str]] = []

    @classmethod
    def of(cls, decoder: Mapping[str, Any] | None, origin: str) -> _Decoding:
        decoding = cls()
        for part in _parts(decoder, "decoders"):
            if not decoding._take(part):
                raise TokenizerError(
                    f"{origin} has a decoder of type {part.get('type')!r}, which no LLaMA tokenizer uses: "
                    "use the tokenizer.json or tokenizer.model of the original model"
                )
        if decoder is None:
            decoding.separator, decoding.strips_leading_space = b" ", True
        return decoding

    def _take(self, part: Mapping[str, Any]) -> bool:
        match part.get("type"):
            case "ByteLevel":
                self.byte_level = True
            case "ByteFallback":
                self.byte_fallback = True
            case "Fuse":
                pass
            case "Replace":
                old = part["pattern"].get("String")
                if old is None:
                    return False
                self.replacements.append((old, part["content"]))
            case "Strip":
                if part.get("content") != " " or part.get("start", 0) > 1 or part.get("stop", 0) > 0:
                    return False
                self.strips_leading_space |= part.get("start", 0) == 1
            case "Metaspace":
                self.replacements.append((part.get("replacement", "▁"), " "))
                scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
                self.strips_leading_space |= scheme != "never"
            case _:
                return False
        return True

    def token_bytes(self, token: str, *, added: bool) -> bytes:
        if self.byte_level and not added:
            try:
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            except KeyError:
                return token.encode()
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return self.separator + token.encode()


def _parts(component: Mapping[str, Any] | None, key: str) -> Sequence[dict[str, Any]]:
    """A component of tokenizer.json, or the members of one that is a Sequence."""
    if component is None:
        return []
    if component.get("type") == "Sequence":
        return [leaf for part in component.get(key, []) for leaf in _parts(part, key)]
    return [dict(component)] if not isinstance(component, dict) else [component]


def byte_level_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the rest counts up from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


_BYTE_OF_CHAR = {char: byte for byte, char in byte_level_alphabet().items()}


def build(state: dict[str, Any], config: TokenizerConfig, *, origin: str) -> JsonVocabulary:
    """From the content of a tokenizer.json that exists only in memory."""
    data = msgspec.json.encode(state)
    return JsonVocabulary(Tokenizer.from_buffer(data), msgspec.json.decode(data, type=_Head), config, origin=origin)
