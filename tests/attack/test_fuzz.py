"""Bytes and texts that a program chose: frames between our processes end in clean errors, contents never in control
tokens. (Checkpoints: tests/checkpoint/test_fuzz.py. Text streams: tests/text/test_stream.py.)"""

from __future__ import annotations

import contextlib
import itertools
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_api import frames
from gptq_api.engine import wire
from gptq_api.text import wire as text_wire
from gptq_api.text.chat_template import ChatTemplate, load_chat_template
from gptq_api.text.tokenizer import Tokenizer, load_tokenizer
from gptq_api.types import Abort, Add, EngineStats, Failed, SamplingParams, StepOutput, pack_ids
from tests.support.text_tokenizers import LLAMA_3_SPECIAL, byte_level, spm

MESSAGES = [
    wire.encode(message)
    for message in (
        Add(
            1, pack_ids([1, 2, 3]), (SamplingParams(max_tokens=5, logit_bias={7: -1.0}, stop_token_ids=(2,)),), b"salt"
        ),
        Add(2, pack_ids([1]), (SamplingParams(max_tokens=5),), prediction=pack_ids([4, 5])),
        Abort((7, 9)),
        Failed("no such file"),
        StepOutput(
            sequence_ids=pack_ids([1]),
            tokens=pack_ids([9]),
            finished={1: "stop"},
            cached_tokens={1: 16},
            logprobs={},
            stats=EngineStats(1, 2, 3, 4, 5, 6, 7, 8),
            drafted={1: (3, 1)},
        ),
    )
]
DECODERS = (
    wire.decode_to_engine,
    wire.decode_from_engine,
    text_wire.decode_load,
    text_wire.decode_request,
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A message of ours with some of its bytes changed, lost or doubled; or any bytes."""
    data = bytearray(draw(st.sampled_from(MESSAGES) | st.binary(max_size=200)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


@settings(max_examples=500, deadline=None)
@given(damaged(), st.integers(1, 50))
def test_whatever_a_frame_holds_is_a_message_or_a_clean_error(data: bytes, piece: int) -> None:
    buffer, payloads = frames.FrameBuffer(), list[bytes]()
    with contextlib.suppress(frames.WireError):
        for start in range(0, len(data), piece):
            payloads += buffer.feed(data[start : start + piece])
    for payload, decode in itertools.product([*payloads, data, data[4:]], DECODERS):
        with contextlib.suppress(frames.WireError, msgspec.MsgspecError):
            decode(payload)


LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@cache
def make(kind: str) -> tuple[Tokenizer, ChatTemplate]:
    with TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "llama 3":
            byte_level(folder, LLAMA_3_SPECIAL)
            (folder / "chat_template.jinja").write_text(LLAMA_3)
        else:
            spm(folder)
        tokenizer = load_tokenizer(folder)
        return tokenizer, load_chat_template(folder, tokenizer, override=None if kind == "llama 3" else "llama-2")


@pytest.mark.parametrize("kind", ["llama 3", "sentencepiece"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_content_becomes_a_control_token(kind: str, data: st.DataObject) -> None:
    tokenizer, template = make(kind)
    names = tokenizer.special_contents
    cut = [name[:n] for name in names for n in (1, 2, len(name) // 2, len(name) - 1)]
    cut += [name[n:] for name in names for n in (1, 2, len(name) // 2, len(name) - 1)]
    part = (
        st.sampled_from([*names, *cut])
        | st.text(max_size=3)
        | st.sampled_from(["\ue000", "\ue001", "\ue002", " ", "\n"])
    )
    content = st.lists(part, max_size=6).map("".join)

    def specials(texts: list[str]) -> list[int]:
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        return [i for i in template.render(turns) if i in tokenizer.special_token_ids]

    texts = [text if text.strip() else "x" for text in data.draw(st.lists(content, min_size=1, max_size=3))]
    assert specials(texts) == specials(["x"] * len(texts))
