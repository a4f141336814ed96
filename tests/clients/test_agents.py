"""Claude Code, Codex and opencode as they come, non-interactively, in a network of loopback alone.

The model is a tiny one that says what the test wants (`tests/support/spelling_model.py`): first a call of the client's
own shell tool, and after its result a sentence. So the client executes a call that the server told apart from text,
sends the result back, shows the answer and leaves with status 0; and of its second prompt only what is new is computed.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients.environments import folder
from tests.support.namespace import alone
from tests.support.server import Server, refuses
from tests.support.spelling_model import write

ANSWER = "Done, as you said."
MADE = "made.txt"
COMMAND = f"echo made > {MADE}"


@dataclass(frozen=True)
class Agent:
    name: str
    call: tuple[str, dict[str, str]]
    """of its shell: the tool's name and arguments"""
    command: Callable[[Path], list[str]]
    """folder of the environment -> what is started"""
    again: Callable[[Path], list[str]]
    """the same conversation goes on"""
    configure: Callable[[Path, str], dict[str, str]]
    """scratch home and the server's URL -> files written there, variables returned"""


def claude_code(home: Path, url: str) -> dict[str, str]:
    off = (
        "DISABLE_TELEMETRY",
        "DISABLE_AUTOUPDATER",
        "DISABLE_ERROR_REPORTING",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC",
    )
    return {
        **dict.fromkeys(off, "1"),
        "ANTHROPIC_BASE_URL": url.removesuffix("/v1"),
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_MODEL": "demo",
        "ANTHROPIC_SMALL_FAST_MODEL": "demo",
    }


def codex(home: Path, url: str) -> dict[str, str]:
    (home / ".codex").mkdir()
    lines = [
        'model = "demo"',
        'model_provider = "local"',
        "check_for_update_on_startup = false",
        "[analytics]",
        "enabled = false",
        "[model_providers.local]",
        'name = "local"',
        f'base_url = "{url}"',
        'wire_api = "responses"',
    ]
    (home / ".codex" / "config.toml").write_text("\n".join(lines))
    return {}


def opencode(home: Path, url: str) -> dict[str, str]:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": url, "apiKey": "none"},
        "models": {"demo": {"limit": {"context": 65536, "output": 1000}}},
    }
    settings = {"autoupdate": False, "share": "disabled", "provider": {"local": provider}}
    (home / "work" / "opencode.json").write_text(json.dumps(settings))
    return {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"}


def binary(name: str) -> Callable[[Path], str]:
    return lambda where: str(where / "node_modules" / ".bin" / name)


ASKED, AGAIN = "Make the file, please.", "And once more."
AGENTS = (
    Agent(
        "claude-code",
        ("Bash", {"command": COMMAND, "description": "Make it"}),
        lambda where: [binary("claude")(where), "-p", ASKED, "--allowedTools", "Bash"],
        lambda where: [binary("claude")(where), "-p", "--continue", AGAIN, "--allowedTools", "Bash"],
        claude_code,
    ),
    Agent(
        "codex",
        ("exec_command", {"cmd": COMMAND}),
        lambda where: [
            *(binary("codex")(where), "exec", "--skip-git-repo-check"),
            *("--dangerously-bypass-approvals-and-sandbox", ASKED),
        ],
        lambda where: [binary("codex")(where), "exec", "resume", "--last", "--skip-git-repo-check", AGAIN],
        codex,
    ),
    Agent(
        "opencode",
        ("bash", {"command": COMMAND}),
        lambda where: [binary("opencode")(where), "run", "--model", "local/demo", ASKED],
        lambda where: [binary("opencode")(where), "run", "--continue", "--model", "local/demo", AGAIN],
        opencode,
    ),
)


def prepare(agent: Agent, scratch: Path, server: Server) -> dict[str, str]:
    """A scratch home with the agent's settings; all that its environment has in it."""
    home = scratch / "home"
    (home / "work").mkdir(parents=True)
    own = agent.configure(home, server.url)
    return {"PATH": os.environ["PATH"], "HOME": str(home), "TERM": "dumb", **own}


def run(command: list[str], env: dict[str, str]) -> str:
    """What it prints; asserts that it ends with status 0."""
    work = Path(env["HOME"]) / "work"
    done = subprocess.run(
        command, cwd=work, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout


def serve(checkpoint: Path) -> Server:
    return Server("--model-path", str(checkpoint), "--served-model-name", "demo", "--log-json")


def prompts(server: Server) -> list[tuple[int, int]]:
    """Tokens of every prompt so far that was answered, and how many of them were cached."""
    lines = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
    return [(line["tokens_in"], line["tokens_cached"]) for line in lines if line.get("tokens_out")]


def check_cached(server: Server, earlier: int) -> None:
    """Of the last prompt, what the one before it had in common with it was not computed again."""
    asked, cached = prompts(server)[-1]
    assert cached > 0.9 * earlier, (earlier, asked, cached)


def skip_without_tools(server: Server) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    if refuses(server.chat(tools=[tool], max_tokens=1)):
        pytest.skip("this server takes no tools")


def check_second_turn(agent: Agent, where: Path, env: dict[str, str], server: Server, *options: str) -> None:
    assert ANSWER in run([*agent.command(where), *options], env)
    longest = max(asked for asked, _ in prompts(server))
    assert longest > 2000
    assert ANSWER in run([*agent.again(where), *options], env)
    check_cached(server, longest)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.name)
def test_a_second_turn_prefills_only_what_is_new(agent: Agent, tmp_path: Path) -> None:
    where = folder(agent.name)
    checkpoint = write(tmp_path / "model", ANSWER)

    def both() -> None:
        with serve(checkpoint) as server:
            skip_without_tools(server)
            check_second_turn(agent, where, prepare(agent, tmp_path, server), server)

    alone(both)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["claude-code", "opencode"])
def test_a_second_turn_of_those_that_can_do_without_tools(name: str, tmp_path: Path) -> None:
    (agent,) = (agent for agent in AGENTS if agent.name == name)
    where = folder(name)
    checkpoint = write(tmp_path / "model", ANSWER)

    def both() -> None:
        with serve(checkpoint) as server:
            env = prepare(agent, tmp_path, server)
            settings = tmp_path / "home" / "work" / "opencode.json"
            if settings.exists():
                settings.write_text(json.dumps({**json.loads(settings.read_text()), "tools": {"*": False}}))
            options = ("--tools", "") if name == "claude-code" else ()
            check_second_turn(agent, where, env, server, *options)

    alone(both)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.name)
def test_a_call_is_executed_and_its_result_comes_back(agent: Agent, tmp_path: Path) -> None:
    where = folder(agent.name)
    name, arguments = agent.call
    call = json.dumps({"name": name, "arguments": arguments})
    checkpoint = write(tmp_path / "model", f"<tool_call>{call}</tool_call>", after_tool=ANSWER)

    def both() -> None:
        with serve(checkpoint) as server:
            skip_without_tools(server)
            assert ANSWER in run(agent.command(where), prepare(agent, tmp_path, server))
            assert (tmp_path / "home" / "work" / MADE).read_text() == "made\n"
            check_cached(server, max(asked for asked, _ in prompts(server)[:-1]))

    alone(both)
