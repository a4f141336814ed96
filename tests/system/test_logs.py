"""Logging never waits: not for a pipe that nobody reads, and not at the end. Nothing is lost where somebody reads."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_api.demo import DEMO_PATH
from gptq_api.logs import ATOMIC_BYTES, FLUSH_S, MAX_QUEUED_BYTES, Writer
from tests.support.commands import Commands
from tests.support.server import START_S, Server, chat_body, stream_chunks, wait_for

DROPPED = "gptq_api:log_lines_dropped_total"
LEAVES_S = 8
"""a second for what is queued in either process, and a busy machine"""

WARNING_STEPS = """
import logging, sys
if "gptq_api.engine.process" in sys.orig_argv:
    from gptq_api.engine.core import Engine
    step = Engine.step
    def loud(self):
        logging.getLogger("test").warning("a step " + "x" * 200)
        return step(self)
    Engine.step = loud
"""

FAULTY_STEP = """
import os, sys
if "gptq_api.engine.process" in sys.orig_argv:
    from gptq_api.runner.cpu.runner import CpuRunner
    launch = CpuRunner.launch
    def faulty(self, step):
        if any(new.params.seed == 667 for new in step.admitted):
            os.write(2, b"a kernel's last words\\n")
            raise RuntimeError("injected")
        return launch(self, step)
    CpuRunner.launch = faulty
"""


@pytest.fixture
def unread() -> Iterator[int]:
    """The writing end of a small pipe that nobody reads."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    yield writing
    os.close(reading)
    os.close(writing)


def fill(pipe: int) -> None:
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(pipe, b"." * 64):
            pass
    os.set_blocking(pipe, True)


def injected(folder: Path, code: str) -> dict[str, str]:
    """An environment in which both processes run `code` at their start."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


@contextlib.contextmanager
def unheard_server(stderr: int, env: dict[str, str]) -> Iterator[tuple[Server, http.client.HTTPConnection]]:
    """A server whose log cannot be seen, and a connection to it once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Server(port=port, env=env, wait=False, stderr=stderr) as server:  # steps are counted
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)

        def is_ready() -> bool:
            with contextlib.suppress(ConnectionRefusedError):
                connection.request("GET", "/ready")
                response = connection.getresponse()
                response.read()
                return response.status == 200
            connection.close()
            return False

        wait_for(is_ready, START_S)
        yield server, connection
        connection.close()


def get(connection: http.client.HTTPConnection, path: str, **headers: str) -> str:
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    assert response.status == 200
    return response.read().decode()


def dropped(connection: http.client.HTTPConnection) -> float:
    (line,) = [line for line in get(connection, "/metrics").splitlines() if line.startswith(DROPPED)]
    return float(line.rsplit(" ", 1)[1])


def test_requests_do_not_wait_for_a_log_that_nobody_reads(unread: int, tmp_path: Path) -> None:
    with unheard_server(unread, injected(tmp_path, WARNING_STEPS)) as (server, connection):
        assert dropped(connection) == 0
        name = "x" * 100
        for _ in range(MAX_QUEUED_BYTES // len(name)):
            get(connection, "/version", **{"x-request-id": name})
        of_requests = dropped(connection)
        assert of_requests > 0
        steps = MAX_QUEUED_BYTES // 200
        body = chat_body("Count from one to ten.", max_tokens=100, ignore_eos=True)
        for _ in range(steps // 100 + 1):
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
            assert json.load(connection.getresponse())["usage"]["completion_tokens"] == 100
        assert dropped(connection) > of_requests + steps // 100 + 1, "the engine's lines count as well"
        server.signal(signal.SIGTERM)
        started = time.monotonic()
        assert server.wait(LEAVES_S) == 0
        assert time.monotonic() - started < LEAVES_S


def test_the_death_of_the_engine_ends_a_server_whose_log_is_stuck(unread: int) -> None:
    with unheard_server(unread, {}) as (server, connection):
        get(connection, "/health")
        fill(unread)
        os.kill(server.engine_pid, signal.SIGKILL)
        assert server.wait(LEAVES_S) == 70


def test_a_start_that_fails_does_not_wait_for_its_reader(unread: int, tmp_path: Path) -> None:
    fill(unread)
    command = ["serve", "--port", "0", "--model-path", str(tmp_path / "none")]
    with Server(command=command, wait=False, stderr=unread) as server:
        assert server.wait(LEAVES_S + 5) == 1


def test_nothing_is_lost_and_lines_keep_their_order() -> None:
    with Server() as server:
        assert server.metric(DROPPED) == 0
        names = [f"line-{i}" for i in range(500)]
        for name in names:
            assert server.http.get("/version", headers={"x-request-id": name}).status_code == 200
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        lines = server.log().splitlines()
        found = [word.removeprefix("request_id=") for line in lines for word in line.split() if "=line-" in word]
        assert found == names
        assert "stopped" in lines[-1]


def test_every_line_of_both_processes_is_json(tmp_path: Path) -> None:
    """A warning of the engine's while it loads, and the exception it dies of."""
    model = tmp_path / "model"
    shutil.copytree(DEMO_PATH, model)
    (weights,) = model.glob("*.safetensors")
    save_file(load_file(weights) | {"model.surplus": torch.zeros(1)}, weights, metadata={"format": "pt"})
    env = injected(tmp_path, FAULTY_STEP)
    with Server("--model-path", str(model), "--log-json", env=env) as server:
        assert stream_chunks(server, chat_body(seed=667))[-1]["error"]["code"] == "engine_dead"
        assert server.wait(LEAVES_S) == 70
        lines = [json.loads(line) for line in server.log().splitlines()]
    (warning,) = [line for line in lines if "model.surplus" in line["event"]]
    assert warning["level"] == "warning" and warning["logger"] == "gptq_api.runner.load"
    (last_words,) = [line for line in lines if "RuntimeError: injected" in line.get("exception", "")]
    assert last_words["level"] == "critical"
    assert [line["logger"] for line in lines if line["event"] == "a kernel's last words"] == ["engine"]
    assert lines[-1]["exit_status"] == 70


EARLY_AND_OFTEN = """
import os, sys, warnings
if "gptq_api.engine.process" in sys.orig_argv:
    from gptq_api import logs
    configure = logs.configure
    def warned(*args):
        os.write(2, b"a library's own words\\nand more of them\\n")
        writer = configure(*args)
        warnings.warn("before the engine knows its settings")
        return writer
    logs.configure = warned
elif "serve" in sys.orig_argv:
    import gptq_api.api.speed
    gptq_api.api.speed.PERIOD_S = 0.1
"""


def test_what_the_lines_say(tmp_path: Path) -> None:
    """Of requests, and how fast the engine is while it works."""
    body = chat_body("Count from one to ten.", max_tokens=900, ignore_eos=True)
    with Server("--log-json", env=injected(tmp_path, EARLY_AND_OFTEN)) as server:

        def lines(event: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = [json.loads(line) for line in server.log().splitlines()]
            return [line for line in found if event in line["event"]]

        assert server.post("/v1/chat/completions", {**body, "n": 2}).status_code == 200
        assert server.post("/v1/chat/completions", {**body, "top_p": 7}).status_code == 400
        assert server.post("/v1/chat/completions", {**body, "model": "other"}).status_code == 404
        assert server.http.get("/v1/nothing").status_code == 404
        assert [line["error"] for line in wait_for(lambda: lines("/v1/nothing"), 5)] == ["unknown_url"]
        done, wrong, other = lines("POST /v1/chat/completions")
        assert list(done)[:2] == ["status", "ms"] and list(done)[-4:] == ["request_id", "event", "level", "timestamp"]
        assert done["tokens_out"] == 1800 and "error" not in done
        assert (wrong["error"], other["error"]) == ("invalid_value", "model_not_found")
        assert list(wrong)[:3] == ["status", "ms", "error"]
        speed = lines("speed")
        assert speed and all(line.keys() >= SPEED for line in speed)
        assert any(line["running"] == 2 and line["cache_pct"] > 0 for line in speed)
        assert sum(line["generation_tok_s"] for line in speed) > 0 and speed[0]["prompt_tok_s"] > 0
        server.wait_idle()
        time.sleep(0.7)
        num_lines = len(lines("speed"))
        time.sleep(0.7)
        assert len(lines("speed")) == num_lines, "nothing is said of an engine that rests"
        (early,) = lines("before the engine knows its settings")
        assert early["level"] == "warning"
        (foreign,) = lines("a library's own words")
        assert foreign["logger"] == "engine" and lines("and more of them")


SPEED = {"prompt_tok_s", "generation_tok_s", "running", "waiting", "cache_pct"}


@pytest.mark.parametrize("as_json", [False, True])
def test_a_start_that_fails_is_the_last_line(as_json: bool, commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    done = commands.run("serve", str(tmp_path), "--port", "0", *(["--log-json"] if as_json else []))
    assert done.returncode == 1
    *before, last = done.stderr.splitlines()
    assert any("loading" in line for line in before)
    assert (json.loads(last)["event"] if as_json else last).startswith("gptq-api serve: ")
    if as_json:
        assert all(json.loads(line) for line in before)


BUGS = """
import logging, threading, warnings
from gptq_api.logs import configure, say
configure("info", True)
class Broken:
    def __del__(self):
        raise ValueError("of a destructor")
def fail():
    raise ValueError("of a thread")
warnings.warn("of Python")
logging.getLogger("library").error("of a library")
say("of ours")
Broken()
thread = threading.Thread(target=fail)
thread.start()
thread.join()
raise ValueError("of the program")
"""


LINES = """
import logging, sys
from pathlib import Path
import structlog
from gptq_api.logs import answer, configure
log = structlog.get_logger()
configure(sys.argv[1], sys.argv[2] == "json")
log.debug("unheard")
log.info("hello", num=1, name="two words", none=None, path=Path("/x"), empty="", quote='q"uote', plain="a-b")
logging.getLogger("library").warning("of a library")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("a bug", request_id="r")
answer("serving", ready_after="1 s")
"""


def said(level: str, form: str, stderr: int = subprocess.PIPE) -> str:
    command = [sys.executable, "-c", LINES, level, form]
    return subprocess.run(command, stderr=stderr, text=True, timeout=30, check=True).stderr


def test_how_lines_look() -> None:
    first, foreign, bug, *trace, last = said("info", "text").splitlines()
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d \[info     \] hello num=1 name='two words' none=None path=PosixPath\('/x'\) empty= "
        r"quote='q\"uote' plain=a-b",
        first,
    )
    assert foreign[9:] == "[warning  ] of a library [library]" and bug[9:] == "[error    ] a bug request_id=r"
    assert trace[0] == "Traceback (most recent call last):" and trace[-1] == "ZeroDivisionError: division by zero"
    assert last[9:] == "[info     ] serving ready_after='1 s'"
    bug, *_, last = said("error", "text").splitlines()
    assert "a bug" in bug and "serving" in last, "an answer is given at every level"


def test_lines_as_json() -> None:
    first, foreign, bug, last = map(json.loads, said("info", "json").splitlines())
    assert list(first)[-3:] == ["event", "level", "timestamp"] and re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", first["timestamp"]
    )
    assert (first["num"], first["none"], first["path"]) == (1, None, "PosixPath('/x')")
    assert (foreign["event"], foreign["logger"], foreign["level"]) == ("of a library", "library", "warning")
    assert bug["exception"].endswith("ZeroDivisionError: division by zero") and bug["level"] == "error"
    assert (last["event"], last["ready_after"]) == ("serving", "1 s")


def test_a_terminal_sees_colors() -> None:
    ours, terminal = os.openpty()
    said("info", "text", terminal)
    os.close(terminal)
    seen = os.read(ours, 65536).decode()
    os.close(ours)
    assert "[\x1b[32m\x1b[1minfo     \x1b[0m] \x1b[1mhello\x1b[0m \x1b[36mnum\x1b[0m=\x1b[35m1\x1b[0m " in seen
    assert "\x1b[1mof a library\x1b[0m [" in seen and "\x1b[34mlibrary\x1b[0m]" in seen


def test_whatever_the_interpreter_would_write_is_a_line() -> None:
    done = subprocess.run([sys.executable, "-c", BUGS], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    sources = ["of Python", "of a library", "of ours", "of a destructor", "of a thread", "of the program"]
    for source, line in zip(sources, lines, strict=True):
        assert source in line["event"] + line.get("exception", "")


def test_lines_keep_their_order_and_are_not_torn() -> None:
    """Two writers, as two processes have, and a pipe that is full most of the time."""
    reading, writing = os.pipe()
    writers = [Writer(writing), Writer(writing)]
    long = "x" * (ATOMIC_BYTES - 20)
    for i in range(200):
        for name, writer in enumerate(writers):
            writer.msg(f"{name} {i} {long if i % 20 == 0 else 'short'}.")
    found: list[list[int]] = [[], []]
    with open(reading, encoding="utf-8") as pipe:
        for _ in range(400):
            writer_name, number, text = pipe.readline().split()
            assert text in (f"{long}.", "short.")
            found[int(writer_name)].append(int(number))
    assert found == [list(range(200))] * 2
    assert [writer.num_dropped for writer in writers] == [0, 0]
    for writer in writers:
        writer.close()
    os.close(writing)


def test_what_does_not_fit_is_dropped_and_counted() -> None:
    reading, writing = os.pipe()
    fill(writing)
    writer = Writer(writing)
    line = "x" * 999
    started = time.monotonic()
    for _ in range(1000):
        writer.msg(line)
    assert time.monotonic() - started < 1
    assert writer.num_dropped == 1000 - MAX_QUEUED_BYTES // 1000
    started = time.monotonic()
    writer.close()
    assert time.monotonic() - started < FLUSH_S + 1
    # The thread left behind ends before its number may become another pipe's, into which it would go on writing.
    os.close(reading)
    writer._thread.join(10)
    assert not writer._thread.is_alive()
    os.close(writing)


def test_a_reader_that_is_gone_fails_nothing() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    writer = Writer(writing)
    for _ in range(10):
        writer.msg("unheard")
    writer.close()
    assert writer.num_dropped == 10
    os.close(writing)


def test_a_pipe_that_does_not_block_is_waited_for() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    writer = Writer(writing)
    for i in range(2000):
        writer.msg(f"{i:050}")
    with open(reading, encoding="utf-8") as pipe:
        assert [int(pipe.readline()) for _ in range(2000)] == list(range(2000))
    writer.close()
    assert writer.num_dropped == 0
    os.close(writing)


@pytest.mark.parametrize("flags", [("--log-level", "error"), ("--log-level", "warning", "--log-json")])
def test_the_address_is_told_at_every_level(flags: tuple[str, ...]) -> None:
    """Port 0 is nobody's otherwise."""
    with Server(*flags) as server:
        assert server.http.get("/ready").status_code == 200
        (line,) = server.log().splitlines()
        assert f"http://127.0.0.1:{server.port}/v1" in line
        assert "--log-json" not in flags or json.loads(line)["event"].startswith("serving demo at ")


def test_names_do_not_command_a_terminal_nor_forge_lines(commands: Commands, tmp_path: Path) -> None:
    folder = tmp_path / "\x1b[31mred\n12:00:00[info]forged"
    shutil.copytree(DEMO_PATH, folder)
    with Server("--model-path", str(folder)) as server:
        log = server.log()
    assert "\x1b" not in log and "\n12:00:00[info]forged" not in log
    assert log.count(r"\x1b[31mred\n12:00:00[info]forged") == 3
    gone = commands.run("serve", str(folder / "none\x1b[0m"), "--port", "0")
    assert gone.returncode == 1 and gone.stdout == ""
    assert "\x1b" not in gone.stderr and gone.stderr.count("\n") <= 2
