"""A vocabulary as llguidance takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from llguidance import LLTokenizer, TokenizerWrapper

from gptq_api.errors import UserError
from gptq_api.text.tools.patterns.spelling import control_name


class _Bytes:
    is_tokenizer_wrapper = True

    def __init__(self, special: Sequence[str]) -> None:
        names = ("</s>", *map(control_name, special))
        self.tokens = [bytes([i]) for i in range(256)] + [name.encode() for name in names]
        self.special_token_ids = list(range(256, len(self.tokens)))
        self.eos_token_id = 256
        self.bos_token_id = None

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def byte_vocabulary(special: Sequence[str]) -> LLTokenizer:
    """Every byte is a token, and so is each of these control tokens: for grammars that are compiled and not run."""
    return LLTokenizer(cast(TokenizerWrapper, _Bytes(special)), slices=[])


if TYPE_CHECKING:
    from gptq_api.text.process import BlockingTokenizer
    from gptq_api.text.tokenizer import Tokenizer

    Encoder = Tokenizer | BlockingTokenizer


class _Tokens:
    """A checkpoint's tokens, as many as its model has rows."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Encoder, num_rows: int, ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        texts = [tokenizer.token_bytes(i) if i < tokenizer.vocab_size else b"" for i in range(num_rows)]
        # Without text: control tokens, and rows that stand for nothing. A grammar reaches the first by their names.
        self.special_token_ids = [i for i, text in enumerate(texts) if not text]
        names = {i: self._name(i) for i in self.special_token_ids}
        self.tokens = [text or names[i] for i, text in enumerate(texts)]
        self.eos_token_id = ends[0]
        self.bos_token_id = tokenizer.bos_token_id

    def _name(self, token_id: int) -> bytes:
        name = self._tokenizer.id_to_token(token_id) if token_id < self._tokenizer.vocab_size else ""
        return (control_name(name) if name else f"<unused {token_id}>").encode()

    def __call__(self, text: bytes | str) -> list[int]:
        """A text that a grammar demands, in the tokens that the model would write it in; none where that costs too
        much, which leaves the choice to the model."""
        try:
            return self._tokenizer.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)
        except UserError:
            return []


def vocabulary(tokenizer: Encoder, num_rows: int, ends: Sequence[int]) -> LLTokenizer:
    """`num_rows`: ids that the model can produce; `ends`: those that end a text, at least one. Takes some 30 us per
    token."""
    return LLTokenizer(
        cast(TokenizerWrapper, _Tokens(tokenizer, num_rows, ends)), n_vocab=num_rows, eos_token=list(ends)
    )
