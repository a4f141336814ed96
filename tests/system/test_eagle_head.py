"""`serve --draft-model` with an EAGLE-3 head over the model in the package: random weights cost time only; and what is
no head for it is refused at the start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import Recipe
from tests.support.commands import Commands
from tests.support.eagle_heads import HeadRecipe, needs_taps, random_head, write_head
from tests.support.server import Server

pytestmark = needs_taps
DEMO = Recipe(vocab_size=2048, hidden_size=384, num_layers=8, max_position_embeddings=1024)
HEAD = HeadRecipe(DEMO, draft_vocab_size=512, num_heads=6, num_kv_heads=2, head_dim=64, intermediate_size=512)
CHAT = [{"role": "user", "content": "What is a prime number?"}]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_head(tmp_path_factory.mktemp("heads") / "head", random_head(HEAD))


@pytest.fixture(scope="module")
def servers(head: Path) -> Iterator[tuple[Server, Server]]:
    """(without, with a head)."""
    with Server() as plain, Server("--speculate", "auto", "--draft-model", str(head)) as drafted:
        yield plain, drafted


def answer(server: Server, **fields: Any) -> dict[str, Any]:
    body = {"model": "demo", "messages": CHAT, "max_tokens": 80, "logprobs": True, "top_logprobs": 2, **fields}
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 0.8, "seed": 5, "frequency_penalty": 0.4},
        {"temperature": 0.8, "seed": 6, "n": 3},
        {"temperature": 0, "stop": ["number"]},
    ],
    ids=str,
)
def test_answers_are_the_same(servers: tuple[Server, Server], fields: dict[str, Any]) -> None:
    """Twice: the second time behind a cached prefix."""
    for _ in range(2):
        plain, drafted = (answer(server, **fields) for server in servers)
        assert plain["choices"] == drafted["choices"]
        assert plain["usage"]["completion_tokens"] == drafted["usage"]["completion_tokens"]


def test_it_has_drafted_and_the_start_line_says_what(servers: tuple[Server, Server]) -> None:
    answer(servers[1], temperature=0, ignore_eos=True, max_tokens=400)
    assert servers[1].metric("vllm:spec_decode_num_draft_tokens_total") > 0
    assert "; draft model head: EAGLE-3 head for 512 tokens, reads the stream before layers 2, 4, 5" in servers[1].log()


@pytest.mark.parametrize(
    ("recipe", "config", "words"),
    [
        (
            replace(HEAD, served=replace(DEMO, hidden_size=256)),
            {},
            "for a model with hidden_size 256, the served one has",
        ),
        (replace(HEAD, served=replace(DEMO, vocab_size=4096)), {}, "has another vocabulary: it has 4096 tokens"),
        (HEAD, {"num_hidden_layers": 3}, "num_hidden_layers is 3"),
    ],
    ids=["width", "vocabulary", "layers"],
)
def test_what_is_no_head_for_the_model_is_refused_before_the_port_opens(
    commands: Commands, tmp_path: Path, recipe: HeadRecipe, config: dict[str, Any], words: str
) -> None:
    other = write_head(tmp_path / "other", random_head(recipe), **config)
    status, log = commands.refused("--speculate", "auto", "--draft-model", str(other))
    assert status in (1, 2)
    assert words in log and f"--draft-model {other}" in log, log


def test_inspect_says_what_a_head_takes(head: Path, torch_commands: Commands) -> None:
    done = torch_commands.run("inspect", "--draft-model", str(head))
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("draft model")]
    # 2 * 2 * 64 of K and V and 384 of a feature, of 2 bytes
    assert f"{head}: EAGLE-3 head, 1 layers, hidden 384, unquantized, up to 1024 tokens" in line
    assert f"KV cache {2 * (2 * 2 * 64 + 384)} bytes per token" in line
