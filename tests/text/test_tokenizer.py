"""Every kind of tokenizer against the library it comes from, and against what users type."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import regex
import sentencepiece
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from gptq_api.text.stream import TextStream
from gptq_api.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from tests.support.text_tokenizers import KINDS, TEXT, byte_level, llama_json, spm, tiktoken, tiktoken_ranks

SAMPLES = [
    *TEXT[:5],
    "",
    " Hello",
    "  two leading, two trailing  ",
    "\n\n\t x",
    "a\x00b",
    "👩‍👩‍👧‍👦 family",
    "ﬁ ligature ½ ™",
    "</s> <s> <unk> <0x41> <|eot_id|> <|end|>",
]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return load_tokenizer(KINDS[request.param](tmp_path))


@pytest.mark.parametrize("text", SAMPLES)
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not tokenizer.special_token_ids.intersection(ids)


@pytest.mark.parametrize("text", [sample for sample in SAMPLES if "<" not in sample])
@pytest.mark.parametrize("make", [byte_level, llama_json])
def test_json_kinds_encode_and_decode_as_the_library(make: object, text: str, tmp_path: Path) -> None:
    folder = make(tmp_path)  # type: ignore[operator]
    oracle = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    expected = oracle.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == expected
    assert tokenizer.encode(text, parse_special=True) == expected
    assert tokenizer.decode(expected) == oracle.decode(expected)


@pytest.mark.parametrize("text", SAMPLES)
def test_sentencepiece_models_are_encoded_by_sentencepiece(text: str, tmp_path: Path) -> None:
    folder = spm(tmp_path)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(text) == oracle.encode(text)
    assert tokenizer.decode(oracle.encode(text)) == oracle.decode(oracle.encode(text))
    assert tokenizer.encode(text, add_bos=True) == [1, *oracle.encode(text)]


def _by_ranks(text: str) -> list[int]:
    """tiktoken's algorithm from its description: in each piece, merge the neighbours of lowest rank until none is."""
    ranks = {token: rank for rank, token in enumerate(tiktoken_ranks())}
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    ids = []
    for piece in regex.findall(pattern, text):
        data = piece.encode()
        parts = [data] if data in ranks else [bytes([byte]) for byte in data]
        while len(parts) > 1:
            found = min((ranks.get(a + b, 10**9), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
            if found[0] == 10**9:
                break
            parts[found[1] : found[1] + 2] = [parts[found[1]] + parts[found[1] + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.mark.parametrize("text", SAMPLES)
def test_llama_3_rank_files_follow_the_ranks(text: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiktoken(tmp_path))
    assert tokenizer.encode(text) == _by_ranks(text)
    base = len(tiktoken_ranks())
    assert tokenizer.vocab_size == base + 256
    assert tokenizer.id_to_token(base + 9) == "<|eot_id|>"
    assert tokenizer.bos_token_id == base
    assert tokenizer.id_to_token(base + 255) == "<|reserved_special_token_247|>"
    assert tokenizer.encode("x<|eot_id|>", add_bos=True, parse_special=True)[-1] == base + 9


def test_bytes_of_all_tokens_are_what_decoding_joins(tokenizer: Tokenizer) -> None:
    for text in SAMPLES:
        joined = b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(text))
        if tokenizer.strips_leading_space:
            assert joined in (b" " + text.encode(), b"")
        else:
            assert joined == text.encode()
    assert all(tokenizer.token_bytes(token) == b"" for token in tokenizer.special_token_ids)
    single = {tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= single


def test_control_tokens_only_where_asked(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_token_id is not None
    eos = tokenizer.id_to_token(tokenizer.eos_token_id)
    text = f"a{eos}b"
    assert tokenizer.eos_token_id not in tokenizer.encode(text)
    parsed = tokenizer.encode(text, parse_special=True)
    assert parsed.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert eos not in tokenizer.decode(parsed)
    assert eos in tokenizer.decode(parsed, skip_special=False)


def test_bos_once(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_token_id is not None
    bos = tokenizer.id_to_token(tokenizer.bos_token_id)
    for text in ("x", bos + "x", bos + bos + "x"):
        ids = tokenizer.encode(text, add_bos=True, parse_special=True)
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_ids_beyond_the_vocabulary_stand_for_nothing(tokenizer: Tokenizer) -> None:
    for token_id in (tokenizer.vocab_size, 10**6, -1):
        assert tokenizer.token_bytes(token_id) == b""
        assert tokenizer.id_to_token(token_id) == ""
    assert tokenizer.decode([tokenizer.vocab_size]) == ""


def test_tokens_added_behind_a_sentencepiece_model(tmp_path: Path) -> None:
    folder = spm(tmp_path, eos_token="<|im_end|>", pad_token="[PAD]")
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 460, "<|im_start|>": 461, "<|im_end|>": 462}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 463
    assert tokenizer.eos_token_id == 462
    assert tokenizer.encode("<|im_start|>", parse_special=True) == [461]
    assert tokenizer.decode([461, *tokenizer.encode("hi"), 462]) == "hi"


@pytest.mark.parametrize("legacy", [None, True, False])
def test_space_after_a_control_token_follows_legacy(legacy: bool | None, tmp_path: Path) -> None:
    config = {} if legacy is None else {"legacy": legacy}
    tokenizer = load_tokenizer(spm(tmp_path, **config))
    ids = tokenizer.encode("</s>USER", parse_special=True)
    text = b"".join(tokenizer.token_bytes(token) for token in ids)
    assert text == (b"USER" if legacy is False else b" USER")


def test_a_control_token_declared_ordinary_is_still_one(tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    oracle = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    oracle.add_tokens([AddedToken("<|im_start|>", special=False, normalized=False), AddedToken("<think>")])
    oracle.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    marker, think = oracle.token_to_id("<|im_start|>"), oracle.token_to_id("<think>")
    assert marker is not None and think is not None
    assert marker not in tokenizer.encode("<|im_start|>")
    assert marker in tokenizer.encode("<|im_start|>", parse_special=True)
    assert tokenizer.encode("<think>") == [think]  # declared to be text, and looks like text
    assert tokenizer.decode([think]) == "<think>"


def test_limits_saved_by_a_training_script_do_not_cut_prompts(tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    oracle = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    oracle.enable_truncation(4)
    oracle.enable_padding(length=64)
    oracle.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(TEXT[0])) == TEXT[0]


def test_a_vocabulary_whose_words_include_a_control_token(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, ["bos", "stop"])
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["ignore_merges"] = True  # whole words are looked up before merging
    (folder / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("stop")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "stop"


BAD = {
    "nothing": ({}, "holds neither tokenizer.json nor tokenizer.model"),
    "truncated json": ({"tokenizer.json": b'{"version": "1.0", "model": {'}, "tokenizer.json"),
    "not a tokenizer": ({"tokenizer.json": b"[]"}, "tokenizer.json"),
    "not a model": ({"tokenizer.model": b"\x00garbage" * 9}, "tokenizer.model"),
    "an empty model": ({"tokenizer.model": b""}, "tokenizer.model"),
    "half a rank file": ({"tokenizer.model": b"YQ== 0\nYg== 1\n"}, "tokenizer.model is incomplete"),
    "a broken rank": ({"tokenizer.model": b"YQ== 0\nYg==\n"}, "line 2"),
    "broken config": ({"tokenizer_config.json": b"{"}, "tokenizer_config.json"),
    "config of lists": ({"tokenizer_config.json": b"[]"}, "tokenizer_config.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_sentence(case: str, tmp_path: Path) -> None:
    files, words = BAD[case]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(tmp_path)
    message = str(caught.value)
    assert words in message
    assert str(tmp_path) in message
    assert "\n" not in message
    assert "copy" in message or "use the" in message


def test_a_decoder_of_another_family_is_refused_by_name(tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(TokenizerError, match="WordPiece"):
        load_tokenizer(folder)


def test_without_a_decoder_tokens_are_joined_by_spaces_as_the_library_does(tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    words = HFTokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "once": 2, "upon": 3, "a": 4, ",": 5}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["</s>"])
    assert words.decoder is None
    words.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("once upon, a")
    assert tokenizer.decode(ids) == words.decode(ids) == "once upon , a"
    for several in itertools.product(range(1, 6), repeat=3):
        for skip in (True, False):
            assert tokenizer.decode(several, skip_special=skip) == words.decode(several, skip_special_tokens=skip)
    stream = TextStream(tokenizer)
    assert "".join([*(stream.push([i]) for i in ids), stream.finish()]) == "once upon , a"


def test_the_tokenizer_s_process_imports_nothing_large(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "import gptq_api.child, gptq_api.text.worker\n"
        "from gptq_api.text.tokenizer import load_tokenizer\n"
        "from gptq_api.text.chat_template import load_chat_template\n"
        "folder = Path(sys.argv[1])\n"
        "load_chat_template(folder, load_tokenizer(folder)).render([{'role': 'user', 'content': 'x'}])\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'structlog', 'asyncio') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(spm(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
