"""What the README says is what happens: its commands are run, its answers are looked at, its table is up to date."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from gptq_api.demo import DEMO_PATH
from gptq_api.edge.keys import KeyFile
from tests.support.server import Server

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def at(server: Server, text: str) -> str:
    assert "127.0.0.1:8000" in text
    return text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")


def test_the_curl_example_answers(server: Server) -> None:
    (command,) = [block for block in blocks("bash") if block.startswith("curl")]
    done = subprocess.run(["bash", "-c", at(server, command)], capture_output=True, text=True, check=True)
    assert '"object":"chat.completion"' in done.stdout
    assert "quanti" in done.stdout and "4 bit" in done.stdout.replace("4-bit", "4 bits")


def test_the_sdk_example_streams_the_right_answer(server: Server) -> None:
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", at(server, code)], capture_output=True, text=True, check=True)
    assert "1, 2, 3, 4, 5, 6, 7, 8, 9, 10" in done.stdout


def test_the_settings_table_is_up_to_date() -> None:
    check = [sys.executable, str(ROOT / "tools" / "settings_table.py"), "--check"]
    assert subprocess.run(check, check=False).returncode == 0, "run tools/settings_table.py"
    rows = README.split("| flag | default | |\n")[1].split("<!-- end")[0].splitlines()
    assert all(row.startswith("|") and row.endswith("|") for row in rows), "a row in two lines is no table"


def test_its_files_and_make_targets_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE) or target in ("a",), target


def dockerfile() -> tuple[dict[str, str], list[str], list[str]]:
    """Of the image that runs: its variables, its entry point, and the command of its health check."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    stage = re.split(r"^FROM .*$", text, flags=re.MULTILINE)[-1]
    words = [word for line in re.findall(r"^ENV (.*)$", stage, re.MULTILINE) for word in shlex.split(line)]
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", stage, re.MULTILINE)
    (health,) = re.findall(r"^HEALTHCHECK .* CMD (.*)$", stage, re.MULTILINE)
    return dict(word.split("=", 1) for word in words), json.loads(entry), json.loads(health)


def docker_run() -> tuple[dict[str, str], list[str], list[str]]:
    """Of the line that starts a container: the variables, the published ports, and the command after the image."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("docker run ")]
    (line,) = lines
    words = iter(shlex.split(line)[2:])
    options: dict[str, list[str]] = {"--gpus": [], "-p": [], "-v": [], "-e": []}
    for word in words:
        if not word.startswith("-"):
            assert word == "gptq-api", "the image"
            break
        options[word].append(next(words))
    return dict(item.split("=", 1) for item in options["-e"]), options["-p"], list(words)


def test_the_container_starts_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line of the container with the variables of the image and of the line, outside of a container."""
    image, entry, health = dockerfile()
    given, ports, command = docker_run()
    assert entry == ["gptq-api"] and ports == ["8000:{GPTQ_API_PORT}".format_map(image)]
    assert command[-1].startswith("/models/")
    for name in [name for name in os.environ if name.startswith("GPTQ_API_")]:
        monkeypatch.delenv(name)
    ours = {"GPTQ_API_PORT": "0", "GPTQ_API_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    with Server(command=[*command[:-1], str(DEMO_PATH)], env=image | given | ours) as server:
        assert image["GPTQ_API_HOST"] in server.url
        assert server.http.get("/ready").status_code == 200
        environment = os.environ | {"GPTQ_API_PORT": str(server.port)}
        assert subprocess.run([sys.executable, *health[1:]], env=environment, check=False).returncode == 0
        assert server.http.get("/v1/models").status_code == 401
        key = {"authorization": f"Bearer {given['GPTQ_API_API_KEY']}"}
        assert server.http.get("/v1/models", headers=key).status_code == 200
        answer: httpx.Response = server.http.post(
            "/v1/completions", json={"prompt": "1, 2,", "max_tokens": 2}, headers=key
        )
        assert answer.status_code == 200, answer.text
        assert given["GPTQ_API_API_KEY"] not in server.log()


def test_every_flag_it_names_exists() -> None:
    from gptq_api.config import ALL_SETTINGS, flag

    known = {flag(name) for kind in ALL_SETTINGS for name in kind.model_fields}
    named = {
        item
        for block in blocks("bash")
        for line in block.splitlines()
        if "gptq-api " in line and "docker" not in line
        for item in re.findall(r"(?<!\S)--[a-z0-9-]+", line)
    }
    assert named and named <= known, named - known


def test_the_key_file_is_one(tmp_path: Path) -> None:
    (text,) = [block for block in blocks("toml") if "[[key]]" in block]
    file = tmp_path / "keys.toml"
    file.write_text(text)
    alice, batch, prometheus = KeyFile(file).read()
    assert (alice.name, alice.tokens_per_minute, batch.level, prometheus.role) == ("alice", 20000, 10, "metrics")
