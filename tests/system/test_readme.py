"""What the README says is what happens: its commands are run, its answers are looked at, its table is up to date."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from gptq_api.config import Settings
from gptq_api.demo import DEMO_PATH
from gptq_api.edge.keys import KeyFile
from tests.support.batches import count_to, jsonl, request
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.commands import Commands
from tests.support.float_models import random_folder
from tests.support.server import Server
from tests.support.text_tokenizers import byte_level

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
    (port,) = re.findall(r"^EXPOSE (.*)$", stage, re.MULTILINE)
    assert int(port) == Settings.model_fields["port"].default
    return dict(word.split("=", 1) for word in words), json.loads(entry), json.loads(health)


def docker_run() -> tuple[dict[str, str], list[str], list[str]]:
    """Of the line that starts a container: the variables, the published ports, and the command after the image."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("docker run ")]
    (line,) = lines
    words = iter(shlex.split(line)[2:])
    options: dict[str, list[str]] = {"--gpus": [], "-p": [], "-v": [], "-e": []}
    for word in words:
        if not word.startswith("-"):
            assert word.startswith("gptq-api:"), "the image"
            break
        options[word].append(next(words))
    return dict(item.split("=", 1) for item in options["-e"]), options["-p"], list(words)


def test_the_container_starts_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line of the container with the variables of the image and of the line, outside of a container."""
    image, entry, health = dockerfile()
    given, ports, command = docker_run()
    assert entry == ["gptq-api"] and ports == ["8000:8000"]
    assert command[-1].startswith("/models/")
    for name in [name for name in os.environ if name.startswith("GPTQ_API_")]:
        monkeypatch.delenv(name)
    ours = {"GPTQ_API_PORT": "0", "GPTQ_API_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    with Server(command=[*command[:-1], str(DEMO_PATH)], env=image | given | ours) as server:
        assert image["GPTQ_API_HOST"] in server.url
        assert server.http.get("/ready").status_code == 200
        *options, script = health[1:]
        check = [sys.executable, *options, str(ROOT / "deploy" / Path(script).name)]
        assert subprocess.run(check, check=False).returncode == 0
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


COMMANDS = [
    shlex.split(line, comments=True)
    for block in blocks("bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
"""every line that a reader may paste"""
OURS = [words for words in COMMANDS if words[0] == "gptq-api"]
ELSEWHERE = {
    "curl": "test_the_curl_example_answers",
    "docker run": "test_the_container_starts_as_it_says",
}
"""what other tests of this file run"""
NOT_RUN: dict[str, Callable[[list[str]], bool]] = {
    # it installs what runs here, and its target starts this program
    "make serve": lambda words: "gptq-api serve" in make_says(words[1]),
    # it is what runs this
    "make test": lambda words: "-m tests" in make_says(words[1]),
    # the gate builds the wheel and installs it elsewhere, this environment has the package
    "pip install": lambda words: words[2] == "." and "tools/build_wheels.py" in (ROOT / ".ci/run").read_text(),
    # it takes minutes; tests/deploy/test_image.py runs what it made
    "make image": lambda words: "tools/build_image.py" in make_says(words[1]),
}
"""Why a command is not run: what has to be true for that"""
SMALL = {
    "GPTQ_API_DEVICE": "cpu",
    "GPTQ_API_NUM_THREADS": "1",
    "GPTQ_API_PORT": "0",
    "GPTQ_API_GROUP_SIZE": "32",
    "GPTQ_API_NUM_SAMPLES": "4",
    "GPTQ_API_NUM_EVAL_SAMPLES": "2",
    "GPTQ_API_SAMPLE_LENGTH": "64",
    "GPTQ_API_CONTEXT": "64",
    "GPTQ_API_NUM_WINDOWS": "2",
    "GPTQ_API_PROMPT_TOKENS": "8",
    "GPTQ_API_NUM_TOKENS": "4",
    "GPTQ_API_BATCH": "1",
    "GPTQ_API_REPEATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""what the commands leave to the environment"""


def make_says(target: str) -> str:
    return subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_run_here_or_has_a_reason_that_holds(words: list[str]) -> None:
    kind = words[0] if words[0] in ("curl", "gptq-api") else " ".join(words[:2])
    if kind in NOT_RUN:
        assert NOT_RUN[kind](words)
    else:
        assert words in OURS or callable(globals()[ELSEWHERE[kind]])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models and texts that the commands name, small."""
    folder = tmp_path_factory.mktemp("readme")
    made = random_model(Recipe(group_size=128, act_order=True, hidden_size=256, intermediate_size=512, vocab_size=512))
    for name in ("vicuna-7B-1.1-GPTQ-4bit-128g", "vicuna"):
        byte_level(write_checkpoint(folder / "models" / name, made, container="pt"))
        (folder / "models" / name / "llama-4bit-32g.pt").rename(folder / "models" / name / "vicuna.pt")
    random_folder(folder / "models" / "vicuna-fp16")
    (folder / "wiki.txt").write_text(README)
    lines = (json.dumps({"messages": [{"role": "user", "content": part}]}) for part in README.split("\n\n"))
    (folder / "chats.jsonl").write_text("\n".join(lines))
    (folder / "requests.jsonl").write_bytes(jsonl([request("a", count_to(3, model="gpt-9", max_tokens=2))]))
    return folder


Run = Callable[[list[str]], subprocess.CompletedProcess[str]]


@pytest.fixture
def run_here(torch_commands: Commands, models: Path) -> Run:
    """A command, where the models are."""

    def run(words: list[str]) -> subprocess.CompletedProcess[str]:
        args = [word.replace("/models/", f"{models}/models/") for word in words[1:]]
        env = {name: value for name, value in os.environ.items() if not name.startswith("GPTQ_API_")} | SMALL
        return torch_commands.run(*args, cwd=models, env=env, input="Hello\n", seconds=300)

    return run


@pytest.mark.parametrize("words", [words for words in OURS if words[1] == "serve"], ids=" ".join)
def test_it_serves_as_it_says(words: list[str], models: Path, run_here: Run) -> None:
    if "--revision" in words:  # the hub is not here; the command gets as far as asking for it
        done = run_here(words)
        assert done.returncode == 1 and words[2] in done.stderr and "was not downloaded before" in done.stderr
        return
    command = [word.replace("/models/", f"{models}/models/") for word in words[1:]]
    with Server(command=command, env=SMALL) as server:
        name = Path(next((word for word in command if "/models/" in word), "demo")).name
        assert server.http.get("/v1/models").json()["data"][0]["id"] == name
        assert server.chat("Hello", max_tokens=1).status_code == 200


@pytest.mark.parametrize("words", [words for words in OURS if words[1] in ("chat", "inspect")], ids=" ".join)
def test_its_commands_on_a_checkpoint_do_what_it_says(words: list[str], run_here: Run) -> None:
    done = run_here(words)
    assert done.returncode == 0, done.stderr
    if words[1] == "chat":
        assert "first after" in done.stderr and "vicuna_v1.1" in done.stderr
    else:
        assert all(fact in done.stdout for fact in ("layout", "bits", "group size", "act-order", "weights", "fits"))


def test_its_load_test_measures_a_server(server: Server, tmp_path: Path) -> None:
    (words,) = (words for words in OURS if words[1:3] == ["bench", "serve"])
    command = [sys.executable, "-m", "gptq_api", *(at(server, word) if "127" in word else word for word in words[1:])]
    few = ["--concurrency", "1", "--num-requests", "2", "--lengths", "fixed", "--max-tokens", "4"]
    done = subprocess.run([*command, *few], cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0 and "first token ms" in done.stdout, done.stderr
    assert json.loads((tmp_path / "serve.json").read_text())["rows"] and (tmp_path / "serve.png").stat().st_size


@pytest.mark.timeout(600)
def test_its_commands_make_a_checkpoint_and_measure_it(models: Path, run_here: Run) -> None:
    quantize, bench, _ = (words for words in OURS if words[1] in ("quantize", "bench"))
    done = run_here(quantize)
    assert done.returncode == 0 and "perplexity" in done.stderr, done.stderr
    done = run_here(bench)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout and "speed-up" in done.stdout
    assert len(json.loads((models / "bench.json").read_text())["rows"]) == 2 and (models / "bench.png").stat().st_size
    (verify,) = (words for words in OURS if words[1] == "verify")
    done = run_here(verify)
    assert done.returncode == 0 and "transformers" in done.stdout, done.stderr
    assert {words[1] for words in OURS} == {"serve", "chat", "inspect", "quantize", "verify", "bench", "run-batch"}


def test_it_answers_a_file_of_requests(models: Path, run_here: Run) -> None:
    (words,) = (words for words in OURS if words[1] == "run-batch")
    done = run_here(words)
    assert done.returncode == 0, done.stderr
    (line,) = (models / "answers.jsonl").read_text().splitlines()
    assert json.loads(line)["custom_id"] == "a" and json.loads(line)["response"]["status_code"] == 200
