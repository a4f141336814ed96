"""Every command, asked for nonsense: one sentence, exit status 1 or 2, and never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptq_api import exits

NOBODY = "a pipe that nobody reads"
DRIVER = """
import atexit, gc, json, os, signal, sys
from gptq_api.cli import main
from gptq_api.config import ALL_SETTINGS
for kind in ALL_SETTINGS:
    kind.model_rebuild()
def opened(name):
    if name != sys.argv[1]:
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    reading, writing = os.pipe()
    os.close(reading)
    return writing
whole = False
for case in json.load(sys.stdin):
    if case["imports"] and not whole:
        import gptq_api.checkpoint.dense, gptq_api.checkpoint.summary, gptq_api.model.plan, gptq_api.quantize.driver
        import gptq_api.quantize.card, gptq_api.quantize.output, gptq_api.runner.load, gptq_api.verify.ours
        from gptq_api.cli import bench, chat, inspect, quantize, run_batch, serve, verify
        gc.freeze()  # a collection in the child would copy all of it
        whole = True
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        for number, name in ((0, os.devnull), (1, case["out"]), (2, case["err"])):
            os.dup2(opened(name), number)
        os.environ |= case["env"]
        if not case["ends"]:
            atexit._clear()  # torch's, which takes longer than a case; a command registers its own when it runs
        status = main.main([os.fsdecode(argument.encode("latin-1")) for argument in case["args"]])
        if case["ends"]:  # as any interpreter does
            sys.exit(status)
        atexit._run_exitfuncs()
        os._exit(status)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
"""One interpreter with all imported that a case needs, and a process for each case: a fresh one would take a second"""
COMMANDS = ("serve", "chat", "inspect", "quantize", "run-batch", "bench", "verify")
"""those that read a checkpoint; tests/test_hub.py has those of the hub"""
REST: dict[str, list[str]] = {"quantize": ["OUT", "--nearest"]}
"""what stands behind the model"""
Nonsense = Callable[[str, Path], tuple[list[str], dict[str, str]]]


def _of_model(model: Callable[[Path], str]) -> Nonsense:
    def make(command: str, folder: Path) -> tuple[list[str], dict[str, str]]:
        if command == "run-batch":  # whose arguments are files
            return [command, str(folder / "in.jsonl"), str(folder / "out.jsonl"), f"--model-path={model(folder)}"], {}
        rest = (str(folder / "out") if word == "OUT" else word for word in REST.get(command, []))
        return [command, model(folder), *rest], {}

    return make


def _with(*more: str, env: dict[str, str] | None = None) -> Nonsense:
    def make(command: str, folder: Path) -> tuple[list[str], dict[str, str]]:
        args, _ = _of_model(lambda f: "demo")(command, folder)
        return [*args, *(word.replace("FOLDER", str(folder)) for word in more)], env or {}

    return make


def _folder(name: str, **files: bytes) -> Nonsense:
    def make(folder: Path) -> str:
        (folder / name).mkdir(exist_ok=True)
        for file, content in files.items():
            (folder / name / file.replace("__", ".")).write_bytes(content)
        return str(folder / name)

    return _of_model(make)


def _file(name: str, content: bytes) -> Nonsense:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return _of_model(make)


WRONG_USE: dict[str, Nonsense] = {
    "an unknown flag": _with("--nonsense"),
    "an unknown flag like a known one": _with("--devise", "cpu"),
    "a flag without its value": _with("--device"),
    "a choice there is not": _with("--device", "tpu"),
    "a number out of range": _with("--num-threads", "0"),
    "no number": _with("--num-threads", "many"),
    "one argument too many": _with("--device", "cpu", "surplus"),
    "an empty model": _of_model(lambda folder: ""),
    "bytes that are not UTF-8": _of_model(lambda folder: "caf\xe9"),
    "somebody's home": _of_model(lambda folder: "~nobody-of-this-name/model"),
    "a settings file that is not there": _with("--config", "FOLDER/none.toml"),
    "a settings file that is a folder": _with("--config", "FOLDER"),
    "a settings file of other bytes": _with("--config", sys.executable),
    "a name that is too long": _of_model(lambda folder: "/" + "x" * 5000),
    "a variable out of range": _with(env={"GPTQ_API_NUM_THREADS": "-1"}),
    "an unknown variable": _with(env={"GPTQ_API_NONSENSE": "1"}),
}
FAILED: dict[str, Nonsense] = {
    "nothing there": _of_model(lambda folder: "/no/such/folder"),
    "nothing there, with what terminals obey": _of_model(lambda folder: "/no/\x1b[31mred\nline"),
    "a device": _of_model(lambda folder: "/dev/null"),
    "a text": _file("notes.txt", b"hello"),
    "an empty folder": _folder("empty"),
    "a config alone": _folder("alone", config__json=b"{}"),
    "a folder below a file": _of_model(lambda folder: f"{__file__}/model"),
}
BROKEN: dict[str, Nonsense] = {
    "a config that is no JSON": _folder("other", config__json=b"{", model__safetensors=b"x" * 100),
    "weights that are none": _folder("junk", config__json=b"{}", model__safetensors=b"\xff" * 100),
    "a pickle that is none": _folder("pickle", config__json=b"{}", model__pt=b"junk"),
    "an empty file of weights": _folder("hollow", config__json=b"{}", model__safetensors=b""),
}
"""What the engine would say after seconds: tests/checkpoint holds its words against those of inspect"""
READ_HERE = ("inspect", "quantize")
OF_ONE = (
    "chat --url nonsense",
    "chat --url http://127.0.0.1:1/v1",
    "chat --chat-template /no/such/template",
    "inspect --max-model-len 100000",
    "inspect --gptq-wbits 8",
    "inspect --gptq-ckpt none.safetensors",
    "inspect --revision main",
    "serve --host not.an.address.invalid --allow-unauthenticated",
    "serve --host 192.0.2.1 --allow-unauthenticated",
    "serve --chat-template /no/such/template",
    "serve --gptq-ckpt none.safetensors --log-level error",
    "quantize /no/model OUT --calibration /no/text",
    "quantize demo OUT --nearest",
    "quantize demo /no/such/folder/out --nearest",
    "run-batch /no/requests OUT",
    "run-batch / OUT",
    "run-batch /etc/hostname OUT",
    "run-batch /etc/hostname /no/such/folder/out",
    "bench --text /no/such/text",
    "bench --text / ",
    "bench --json /no/such/folder/x.json",
    "bench --json /",
    "bench --fp16 /no/such/model",
    "bench demo /no/such/folder",
)
"""what fails in one command"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[int, str, str]]:
    """Of each case the exit status, standard output and standard error."""
    folder = tmp_path_factory.mktemp("nonsense")
    cases: dict[str, dict[str, Any]] = {}
    for name, make in (WRONG_USE | FAILED).items():
        for command in COMMANDS:
            args, env = make(command, folder)
            cases[f"{command}: {name}"] = {"args": args, "env": env}
    for name, make in BROKEN.items():
        for command in READ_HERE:
            args, env = make(command, folder)
            cases[f"{command}: {name}"] = {"args": args, "env": env}
    for line in OF_ONE:
        args = [word.replace("OUT", str(folder / "out")) for word in line.split()]
        cases[line] = {"args": args + (["--device", "cpu"] if "--url" not in args else []), "env": {}}
    wrong = {f"{command}: {name}" for name in WRONG_USE for command in COMMANDS}
    for index, (name, case) in enumerate(cases.items()):
        case |= {"out": str(folder / f"{index}.out"), "err": str(folder / f"{index}.err")}
        case |= {"imports": name not in wrong, "ends": False}
    for name in (NOBODY, "/dev/full"):
        cases[name] = {"args": ["inspect"], "env": {}, "out": name, "err": str(folder / f"{len(cases)}.err")}
        cases[name] |= {"imports": True, "ends": True}
    env = {name: value for name, value in os.environ.items() if not name.startswith("GPTQ_API_")}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, NOBODY],
        input=json.dumps(list(cases.values())),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env=env | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "GPTQ_API_PORT": "0"},
    )
    statuses = dict(zip(cases, map(int, done.stdout.split()), strict=True))

    def look(name: str) -> tuple[int, str, str]:
        out, err = Path(cases[name]["out"]), Path(cases[name]["err"])
        return statuses[name], out.read_text() if out.is_file() else "", err.read_text()

    return look


def check(told: tuple[int, str, str], command: str, status: int) -> str:
    found, out, err = told
    assert "Traceback" not in err and found == status, err
    lines = err.splitlines()
    if command == "serve" and status == exits.FAILED:  # its log may have said that it began to load
        lines = [line for line in lines if " loading " not in line]
    if command == "bench":
        lines = [line for line in lines if not line.startswith("measuring ")]
    assert len(lines) == 1 and lines[0].startswith(f"gptq-api {command}: "), err
    assert lines[0].isprintable() and len(lines[0]) < 6000 and "\x1b" not in err
    assert out == ""
    return lines[0].partition(": ")[2]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", WRONG_USE)
def test_what_is_asked_wrongly(name: str, command: str, ended: Callable[[str], tuple[int, str, str]]) -> None:
    check(ended(f"{command}: {name}"), command, exits.WRONG_USE)


@pytest.mark.parametrize("name", FAILED)
def test_what_fails_is_told_in_the_same_words_by_those_that_read_checkpoints(
    name: str, ended: Callable[[str], tuple[int, str, str]]
) -> None:
    told = {command: check(ended(f"{command}: {name}"), command, exits.FAILED) for command in COMMANDS}
    assert told["serve"] == told["inspect"] == told["chat"] == told["bench"], told


@pytest.mark.parametrize("command", READ_HERE)
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken(name: str, command: str, ended: Callable[[str], tuple[int, str, str]]) -> None:
    check(ended(f"{command}: {name}"), command, exits.FAILED)


@pytest.mark.parametrize("line", OF_ONE)
def test_what_fails_in_one_command(line: str, ended: Callable[[str], tuple[int, str, str]]) -> None:
    check(ended(line), line.split()[0], exits.FAILED)


def check_nobody_reads(gone: tuple[int, str], stuck: tuple[int, str]) -> None:
    """Of each the exit status and standard error."""
    assert gone == (exits.FAILED, "")
    status, told = stuck
    assert status == exits.FAILED
    assert told.startswith("gptq-api") and told.endswith(
        ": standard output cannot be written: No space left on device\n"
    )
    assert told.count("\n") == 1


def test_a_reader_that_leaves_and_a_disk_that_is_full() -> None:
    command = [sys.executable, "-m", "gptq_api", "--help"]
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full:
        gone = subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, text=True)
        stuck = subprocess.Popen(command, stdout=full, stderr=subprocess.PIPE, text=True)
        os.close(writing)
        told = [process.communicate(timeout=60)[1] for process in (gone, stuck)]
    check_nobody_reads((gone.returncode, told[0]), (stuck.returncode, told[1]))


def test_a_reader_of_inspect_that_leaves_and_a_disk_that_is_full(ended: Callable[[str], tuple[int, str, str]]) -> None:
    check_nobody_reads(*((status, err) for status, _, err in map(ended, (NOBODY, "/dev/full"))))


@pytest.mark.parametrize(
    "env",
    [
        {"LANG": "C", "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"HOME": "/no/such/home"},
        {"TERM": ""},
    ],
    ids=str,
)
def test_surroundings_that_lack_something(env: dict[str, str], tmp_path: Path) -> None:
    """No UTF-8, no home, no terminal."""
    folder = tmp_path / "caf\u00e9 \u2019"
    folder.mkdir()
    env = {"PATH": os.environ["PATH"], **env}
    command = [sys.executable, "-m", "gptq_api"]
    done = subprocess.run([*command, "inspect", folder], env=env, capture_output=True, check=False)
    assert b"Traceback" not in done.stderr and done.stderr.count(b"\n") == 1 and b"caf" in done.stderr
    if "PYTHONUTF8" in env:
        assert (
            done.returncode == exits.WRONG_USE and b"not ASCII, as this process reads them; set PYTHON" in done.stderr
        )
    else:
        assert done.returncode == exits.FAILED and b"holds no weights" in done.stderr


def test_no_standard_streams() -> None:
    closed = 'exec "$0" -m gptq_api "$@" <&- >&- 2>&-'
    for args, status in (
        (["inspect"], 0),
        (["chat", "--url", "http://127.0.0.1:1/v1"], 1),
        (["serve", "--nonsense"], 2),
    ):
        assert subprocess.run(["sh", "-c", closed, sys.executable, *args], check=False).returncode == status, args
