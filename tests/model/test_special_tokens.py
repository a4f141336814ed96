"""Which ids end a text: LLaMA-1 conversions of 2023 name the wrong ones, and the tokenizer is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptq_api.text.tokenizer import Tokenizer, load_tokenizer
from tests.model.test_config import LLAMA1, parse
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.server import Server
from tests.support.text_tokenizers import spm


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """As in the decapoda uploads: sentencepiece, and a config of empty strings."""
    return load_tokenizer(spm(tmp_path, bos_token="", eos_token="", unk_token=""))


def test_the_tokenizer_decides(tokenizer: Tokenizer) -> None:
    named = parse(LLAMA1).eos_token_ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, named) == (1, 2, (1,))
    assert tokenizer.end_ids(named, 32000) == (2,)
    assert tokenizer.end_ids((), 32000) == (2,)
    assert tokenizer.end_ids((7, 2, 9), 32000) == (7, 2, 9)


def test_ids_the_model_does_not_have_cannot_end_a_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.end_ids((0,), 2) == (0,)


def test_a_server_stops_at_the_tokenizers_end(tmp_path: Path) -> None:
    """A model of the wrong config with more rows than its tokenizer has tokens, served as it is."""
    model = random_model(Recipe(vocab_size=512, num_layers=1))
    config: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    folder = spm(write_checkpoint(tmp_path, model, **config), bos_token="", eos_token="", unk_token="")
    with Server("--model-path", str(folder), "--device", "cpu", "--kv-cache-mib", "8") as server:

        def answer(**bias: int) -> tuple[str, int]:
            body = {"model": folder.name, "prompt": "Hello", "max_tokens": 5, "temperature": 0}
            got = server.post("/v1/completions", body | {"logit_bias": {k[1:]: v for k, v in bias.items()}}).json()
            return got["choices"][0]["finish_reason"], got["usage"]["completion_tokens"]

        assert answer(_2=100) == ("stop", 1)
        assert answer(_1=100) == ("length", 5)
        assert answer(_511=100) == ("length", 5)
