"""tokenizer.model of LLaMA 1 and 2: sentencepiece itself encodes.

transformers rebuilds such a model as a merge list and gets 32 of llama.cpp's 47 vectors right where sentencepiece gets
all 47: leading and repeated spaces differ, and a prompt that differs from training by its spaces
is a worse prompt.
"""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from gptq_api.text.tokenizer_config import TokenizerConfig, TokenizerError, read_file

_SPACE = "▁"
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""ModelProto{normalizer_spec(3){add_dummy_prefix(3): false}}: protobuf merges an appended message into the first."""


class SpmVocabulary:
    """A sentencepiece model and the tokens a fine-tune added behind it ([PAD], <|im_start|> ...)."""

    separator = b""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, config: TokenizerConfig) -> None:
        self._processor = processor
        self._size: int = processor.vocab_size()
        self._legacy = config.legacy is not False  # absent means true, as every file of 2023 was made
        self._continuation: sentencepiece.SentencePieceProcessor | None = None
        control = {i: processor.id_to_piece(i) for i in range(self._size) if processor.is_control(i)}
        unknown: int = processor.unk_id()
        if unknown >= 0:
            control[unknown] = processor.id_to_piece(unknown)
        self._added = {i: token.content for i, token in config.added.items() if i >= self._size}
        self.special = control | self._added
        self.vocab_size = max([self._size - 1, *self._added]) + 1
        self._ids = {content: i for i, content in self._added.items()}
        self.strips_leading_space = self._strips()

    @classmethod
    def load(cls, path: Path, config: TokenizerConfig) -> SpmVocabulary:
        try:
            data = read_file(path)
            if not data:  # which the library takes for a model without pieces
                raise RuntimeError("it is empty")
            processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "damaged"
            raise TokenizerError(
                f"{path} is not a sentencepiece model ({reason}): copy it again from the original model"
            ) from None
        return cls(processor, config)

    @property
    def bos(self) -> str | None:
        return self._piece(self._processor.bos_id())

    @property
    def eos(self) -> str | None:
        return self._piece(self._processor.eos_id())

    def encode_plain(self, text: str, *, continues: bool = False) -> list[int]:
        """sentencepiece never makes control tokens from text. After a control token (`continues`) the "legacy" rule
        of LlamaTokenizer decides whether the text gets the leading space again; Vicuna was trained with it."""
        processor = self._processor
        if continues and not self._legacy:
            if self._continuation is None:
                self._continuation = sentencepiece.SentencePieceProcessor(
                    model_proto=processor.serialized_model_proto() + _NO_DUMMY_PREFIX
                )
            processor = self._continuation
        ids: list[int] = processor.encode(text)
        return ids

    def encode_parsed(self, text: str) -> None:
        """sentencepiece cannot; the caller splits the text at control tokens."""
        return

    def token_to_id(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        token_id: int = self._processor.piece_to_id(token)
        return token_id if token_id != self._processor.unk_id() or token == self.special.get(token_id) else None

    def id_to_token(self, token_id: int) -> str:
        if 0 <= token_id < self._size:
            return str(self._processor.id_to_piece(token_id))
        return self._added.get(token_id, "")

    def token_bytes(self, token_id: int) -> bytes:
        if 0 <= token_id < self._size and self._processor.is_byte(token_id):
            return bytes.fromhex(self._processor.id_to_piece(token_id)[3:5])
        return self.id_to_token(token_id).replace(_SPACE, " ").encode()

    def _piece(self, token_id: int) -> str | None:
        return str(self._processor.id_to_piece(token_id)) if token_id >= 0 else None

    def _strips(self) -> bool:
        """Whether the model was trained with a dummy prefix, asked by decoding a piece that starts with a space."""
        for token_id in range(self._size):
            piece = self._processor.id_to_piece(token_id)
            if piece.startswith(_SPACE) and not self._processor.is_control(token_id):
                return bool(self._processor.decode([token_id]) != piece.replace(_SPACE, " "))
        return False
