"""Libraries that talk to an OpenAI server, each in its own environment: the programs in `programs/`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.environments import folder
from tests.support.server import Server, refuses
from tests.support.spelling_model import write

PROGRAMS = Path(__file__).parent / "programs"
LIBRARIES = {
    "langchain": ("langchain.py", ("chat", "tools", "structured")),
    "litellm": ("litellm_client.py", ("chat", "tools", "structured")),
    "instructor": ("instructor_client.py", ("forced", "structured")),
    "pydantic-ai": ("pydantic_ai_client.py", ("chat", "tools", "structured", "forced")),
    "openai-node": ("openai_node.mjs", ("chat", "responses", "tools", "structured")),
    "ai-sdk": ("ai_sdk.mjs", ("chat", "tools", "structured")),
}
"""environment -> its program and the parts of it"""
CALL = '<tool_call>{"name": "multiply", "arguments": {"a": 6, "b": 7}}</tool_call>'
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ASKS: dict[str, dict[str, Any]] = {
    "tools": {"tools": [TOOL]},
    "forced": {"tools": [TOOL], "tool_choice": "required"},
    "structured": {"response_format": {"type": "json_object"}},
}
"""part -> what a server must take, or the part is skipped"""


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    """The demo model."""
    with Server("--served-model-name", "demo") as running:
        yield running


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that calls `multiply`."""
    checkpoint = write(tmp_path_factory.mktemp("calling") / "model", CALL)
    with Server("--model-path", str(checkpoint), "--served-model-name", "demo") as running:
        yield running


def environment(server: Server, home: Path) -> dict[str, str]:
    off = ("DO_NOT_TRACK", "LANGCHAIN_TRACING_V2_DISABLED", "LITELLM_LOCAL_MODEL_COST_MAP", "HF_HUB_OFFLINE")
    env = {"PATH": os.environ["PATH"], "HOME": str(home), **dict.fromkeys(off, "1")}
    return {**env, "OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "none"}


def run(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(command, env=env, cwd=env["HOME"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.parametrize("name, part", [(name, part) for name, (_, parts) in LIBRARIES.items() for part in parts])
def test_a_library(name: str, part: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    where = folder(name)
    server: Server = request.getfixturevalue("calling" if part == "tools" else "plain")
    if part in ASKS and refuses(server.chat(max_tokens=1, **ASKS[part])):
        pytest.skip(f"this server does not take {', '.join(ASKS[part])}")
    program = PROGRAMS / LIBRARIES[name][0]
    if program.suffix == ".mjs":  # which looks for its modules from where it lies
        command = ["node", str(shutil.copy(program, where / program.name))]
    else:
        command = [str(where / "bin" / "python"), str(program)]
    before = len(server.log())
    run([*command, part], environment(server, tmp_path))
    assert "POST /v1/" in server.log()[before:]


def test_the_llm_command(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    llm = str(folder("llm") / "bin" / "llm")
    plain: Server = request.getfixturevalue("plain")
    model = {"model_id": "demo", "model_name": "demo", "api_base": plain.url}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))  # JSON is YAML
    env = {**environment(plain, tmp_path), "LLM_USER_PATH": str(tmp_path)}
    assert run([llm, "-m", "demo", "Hello"], env).strip()
    assert run([llm, "-c", "--no-stream", "And again"], env).strip()
