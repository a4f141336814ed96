"""A vocabulary for random models: token i is the byte i, and one token ends the text."""

from __future__ import annotations

from typing import cast

from llguidance import LLTokenizer, TokenizerWrapper

END = 1


class _Letters:
    is_tokenizer_wrapper = True
    eos_token_id = END
    bos_token_id = None
    special_token_ids = (0, END, 2)

    def __init__(self, size: int) -> None:
        self.tokens = [f"<{i}>".encode() if i in self.special_token_ids else bytes([i]) for i in range(size)]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def letters(size: int) -> LLTokenizer:
    """At most 256 tokens."""
    return LLTokenizer(cast(TokenizerWrapper, _Letters(size)), n_vocab=size, eos_token=[END])
