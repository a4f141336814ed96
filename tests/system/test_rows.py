"""A tokenizer with more ids than the model has rows: prompts that need them are refused, all others are answered."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptq_api.demo import DEMO_PATH
from gptq_api.text.samples import SamplesError, encode_documents
from gptq_api.text.tokenizer import load_tokenizer
from tests.support.server import Server, check_error, stream_chunks

ROWS = 2048
"""of the demo's embedding"""
EXTRA = ["<|tool|>", "<|turn|>", "zebrafish"]
"""added tokens with the ids 2048, 2049 and 2050: two control tokens and one that anybody may type"""


def more_tokens(folder: Path) -> Path:
    """The demo with EXTRA; its template writes <|turn|> behind an answer."""
    shutil.copytree(DEMO_PATH, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for i, content in enumerate(EXTRA):
        added = tokenizer["added_tokens"][0] | {"id": ROWS + i, "content": content, "special": content[0] == "<"}
        tokenizer["added_tokens"].append(added)
    path.write_text(json.dumps(tokenizer))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = (
        "{{ bos_token }}{% for message in messages %}{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] }}"
        "{{ '<|turn|>' if message['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return more_tokens(tmp_path_factory.mktemp("rows") / "more-tokens")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server("--model-path", str(folder), "--device", "cpu") as running:
        yield running


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "?"}]


@pytest.mark.parametrize(
    ("path", "body", "param", "named"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "a zebrafish"}]}, "messages", (2050, EXTRA[2])),
        ("chat/completions", {"messages": TURNS}, "messages", (2049, EXTRA[1])),
        ("chat/completions", {"messages": TURNS[:2], "n": 3, "stream": True}, "messages", (2049, EXTRA[1])),
        ("completions", {"prompt": "a zebrafish"}, "prompt", (2050, EXTRA[2])),
        ("completions", {"prompt": ["a", "b<|tool|>c"]}, "prompt", (2048, EXTRA[0])),
        ("completions", {"prompt": [5, ROWS]}, "prompt", (2048, EXTRA[0])),
        ("completions", {"prompt": [5, 10**6], "max_tokens": 0, "echo": True}, "prompt", (10**6, "")),
        ("completions", {"prompt": "x", "stop_token_ids": [ROWS]}, "stop_token_ids", (2048, "")),
        ("completions", {"prompt": "x", "logit_bias": {str(ROWS): 1}}, "logit_bias", (2048, "")),
    ],
)
def test_a_prompt_the_model_has_no_row_for(
    server: Server, path: str, body: dict[str, Any], param: str, named: tuple[int, str]
) -> None:
    error = check_error(server.post(f"/v1/{path}", body), 400, param, "invalid_value")
    token_id, text = named
    assert f"token id {token_id}" in error["message"] and str(ROWS) in error["message"]
    assert text in error["message"]
    if param in ("messages", "prompt"):
        assert "no row" in error["message"]
    assert server.http.get("/health").status_code == 200
    assert server.chat(max_tokens=2, temperature=0).status_code == 200, "the engine lives"


def test_a_stop_token_the_model_cannot_produce_is_none(server: Server) -> None:
    """The template's end of an answer has no row: it may not reach the sampler, which min_tokens would show it to."""
    answer = server.chat("What is GPTQ?", min_tokens=3, max_tokens=6, temperature=0, ignore_eos=False)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 3
    found = stream_chunks(server, {"messages": TURNS[:1], "min_tokens": 2, "max_tokens": 3, "n": 2})
    assert "error" not in found[-1]


def test_text_is_text_with_or_without_a_row(server: Server) -> None:
    """/tokenize and /detokenize are about the tokenizer, which knows all its ids."""
    tokens = server.post("/tokenize", {"prompt": "a zebrafish<|tool|>", "add_special_tokens": False}).json()["tokens"]
    assert tokens[-2:] == [2050, 2048]
    assert server.post("/detokenize", {"tokens": tokens}).json()["prompt"] == "a zebrafish<|tool|>"
    check_error(server.post("/detokenize", {"tokens": [ROWS + len(EXTRA)]}), 400, "tokens")


def test_the_log_says_how_many_ids_have_no_row(server: Server) -> None:
    line = "the tokenizer has 3 ids that the model has no row for; prompts that need them are refused"
    assert server.log().count(line) == 1
    assert "Traceback" not in server.log()


def test_chat_in_process_refuses_it_too(folder: Path) -> None:
    command = [sys.executable, "-m", "gptq_api", "chat", str(folder), "--device", "cpu", "--max-tokens", "4"]

    def chat(lines: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60, check=False)

    done = chat("Hello\nthen\n")
    assert done.returncode == 1 and done.stderr.count("first after") == 1
    assert done.stderr.splitlines()[-1] == (
        "gptq-api chat: the model has no row for token id 2049 ('<|turn|>'); it has 2048"
    )
    assert "token id 2050 ('zebrafish')" in chat("a zebrafish\n").stderr


def test_texts_for_calibration_and_perplexity(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    path = Path("text.txt")
    assert encode_documents(["a fish"], path, tokenizer, None, ROWS) == [tokenizer.encode("a fish", add_bos=True)]
    with pytest.raises(SamplesError, match=r"text\.txt .*token id 2050 \('zebrafish'\)"):
        encode_documents(["a fish", "a zebrafish"], path, tokenizer, None, ROWS)
