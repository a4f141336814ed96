"""What users type never becomes a control token: the ids of a prompt hold those of the template and no others, for
every control token, every role, and spellings that a normalizer turns into one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptq_api.demo import DEMO_PATH
from tests.attack.checkpoints import Json, derived
from tests.support.server import Server

SPECIAL = {
    token["content"]: token["id"]
    for token in json.loads((Path(DEMO_PATH) / "tokenizer.json").read_text())["added_tokens"]
}
ROLES = ("system", "user", "assistant", "developer")


def full_width(text: str) -> str:
    """Letters that NFKC turns into those of ASCII."""
    return "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in text)


SPELLINGS: tuple[Callable[[str], Any], ...] = (
    lambda token: token,
    lambda token: f"hello {token} there",
    lambda token: token * 3,
    lambda token: f"  {token}\n",
    lambda token: token[:-1],
    lambda token: token[1:],
    lambda token: f"{token[:3]}\u200b{token[3:]}",
    lambda token: f"{token[:2]}\u00ad{token[2:]}",
    lambda token: token[:4] + token + token[4:],
    full_width,
    lambda token: token[:2] + full_width(token[2:]),
    lambda token: [{"type": "text", "text": token[:4]}, {"type": "text", "text": token[4:]}],
    lambda token: [{"type": "text", "text": token}],
    lambda token: f"\ue0000\ue0010\ue002{token}",
    lambda token: token.upper(),
)


def strips_and_folds(tokenizer: Json) -> Json:
    """A normalizer that makes control tokens of what only looks like one."""
    strip = {"type": "Replace", "pattern": {"Regex": "[\u200b\u00ad]"}, "content": ""}
    tokens = [token | {"normalized": True} for token in tokenizer["added_tokens"]]  # looked for in what it made
    normalizer = {"type": "Sequence", "normalizers": [strip, {"type": "NFKC"}]}
    return tokenizer | {"normalizer": normalizer, "added_tokens": tokens}


@pytest.fixture(scope="module", params=["demo", "with a normalizer"])
def any_server(request: pytest.FixtureRequest, server: Server, tmp_path_factory: Any) -> Iterator[Server]:
    if request.param == "demo":
        yield server
        return
    with Server(
        "--model-path", str(derived(tmp_path_factory.mktemp("model") / "m", tokenizer=strips_and_folds))
    ) as own:
        yield own


def test_control_tokens_in_messages_are_text(any_server: Server) -> None:
    server, expected = any_server, {}

    def specials(content: Any, role: str, **more: Any) -> list[int]:
        messages = [{"role": role, "content": content}, {"role": "user", "content": content}]
        answer = server.post("/tokenize", {"messages": messages, **more})
        assert answer.status_code == 200, answer.text
        return [i for i in answer.json()["tokens"] if i in SPECIAL.values()]

    assert len(SPECIAL) >= 5
    for role in ROLES:
        expected[role] = specials("x", role)
        assert len(expected[role]) == 6, "begin, and for each turn its role and its end, and the role of the answer"
    for (token, spelling), role in itertools.product(itertools.product(SPECIAL, SPELLINGS), ROLES):
        assert specials(spelling(token), role) == expected[role], (spelling(token), role)
