"""`serve --draft-model` over HTTP: the same answers; and what cannot draft is refused at the start."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptq_api.demo import DEMO_PATH
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.commands import Commands
from tests.support.server import Server
from tests.support.text_tokenizers import byte_level

COMPLETIONS = "/v1/completions"
RECIPE = Recipe(vocab_size=512, hidden_size=128, intermediate_size=256, num_layers=3, max_position_embeddings=512)
PROMPT = "A small model guesses, and a large one decides."


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(write_checkpoint(tmp_path_factory.mktemp("served"), random_model(RECIPE)))


@pytest.fixture(scope="module")
def servers(served: Path) -> Iterator[tuple[Server, Server]]:
    """(without, drafted for by the very same model)."""
    path = ("--model-path", str(served), "--served-model-name", "tiny")
    with (
        Server(*path) as plain,
        Server(*path, "--speculate", "auto", "--draft-model", str(served)) as drafted,
    ):
        yield plain, drafted


def answer(server: Server, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 60, "logprobs": 2, "ignore_eos": True, **fields}
    response = server.post(COMPLETIONS, body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 1, "seed": 5},
        {"temperature": 0.9, "seed": 6, "n": 3, "frequency_penalty": 1},
    ],
    ids=str,
)
def test_answers_are_the_same(servers: tuple[Server, Server], fields: dict[str, Any]) -> None:
    plain, drafted = (answer(server, **fields) for server in servers)
    assert plain["choices"] == drafted["choices"]
    assert plain["usage"]["completion_tokens"] == drafted["usage"]["completion_tokens"]


def test_a_stop_string_in_the_middle_of_a_draft(servers: tuple[Server, Server]) -> None:
    text = answer(servers[0], temperature=0)["choices"][0]["text"]
    plain, drafted = (answer(server, temperature=0, stop=text[20:24]) for server in servers)
    assert plain["choices"] == drafted["choices"] and plain["choices"][0]["finish_reason"] == "stop"


def test_the_start_line_says_what_drafts(servers: tuple[Server, Server]) -> None:
    log = servers[1].log()
    assert "; draft model served" in log and "a token of it takes" in log and "weights" in log
    assert "draft model" not in servers[0].log()


def test_what_cannot_draft_is_refused_before_the_port_opens(commands: Commands, served: Path, tmp_path: Path) -> None:
    def refused(*flags: str) -> str:
        status, log = commands.refused("--model-path", *flags)
        assert status in (1, 2)
        return log

    other = byte_level(write_checkpoint(tmp_path / "other", random_model(replace(RECIPE, vocab_size=4096))))
    assert "has a vocabulary of 4096, the served model of 512" in refused(
        str(served), "--speculate", "auto", "--draft-model", str(other)
    )
    gone = tmp_path / "gone"
    shutil.copytree(other, gone, ignore=shutil.ignore_patterns("*.safetensors"))
    assert f"--draft-model {gone}: " in refused(str(served), "--speculate", "auto", "--draft-model", str(gone))
    assert "has another vocabulary: token " in refused(
        str(served), "--speculate", "auto", "--draft-model", str(DEMO_PATH)
    )
    assert "--speculate off says not to" in refused(str(served), "--speculate", "off", "--draft-model", str(other))
