"""`gptq-api` commands in processes that are forked from one interpreter: one of its own takes a command a second of
processor time, most of it for imports. What a test says of the start itself, or of signals, needs one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_DRIVER = """
import gc, importlib, json, os, resource, signal, sys
from gptq_api import __main__
for name in sys.argv[3:]:
    importlib.import_module(name)
gc.freeze()  # a collection in a child would copy all of it
asked, answers = os.fdopen(int(sys.argv[1])), os.fdopen(int(sys.argv[2]), "w", buffering=1)
for line in asked:
    case = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(case["seconds"])
        os.dup2(reading, 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(case[name], os.O_WRONLY), number)
        os.closerange(3, 64)
        os.chdir(case["cwd"])
        if case["max_file_bytes"] is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python has it, which a shell's limit meets
            resource.setrlimit(resource.RLIMIT_FSIZE, (case["max_file_bytes"],) * 2)
        os.environ.clear()
        os.environ.update(case["env"])
        sys.argv[1:] = case["args"]
        sys.exit(__main__.main())
    os.close(reading)
    try:
        with os.fdopen(writing, "w") as pipe:
            pipe.write(case["input"])
    except BrokenPipeError:  # it has ended without reading
        pass
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers)
"""
CLI = (
    *("gptq_api.cli.main", "gptq_api.cli.chat", "gptq_api.cli.list", "gptq_api.cli.pull", "gptq_api.cli.rm"),
    *("gptq_api.cli.serve", "gptq_api.cli.run_batch", "gptq_api.api.app", "gptq_api.api.listener"),
)
TORCH = (
    *("gptq_api.cli.main", "gptq_api.cli.inspect", "gptq_api.cli.quantize", "gptq_api.cli.verify"),
    *("gptq_api.checkpoint.summary", "gptq_api.model.plan", "gptq_api.runner.load", "gptq_api.verify.ours"),
    *("gptq_api.quantize.driver", "gptq_api.quantize.card", "gptq_api.quantize.output"),
)


class Commands:
    """`with Commands(CLI) as commands: done = commands.run("chat", "--url", url, input="Hello")`."""

    def __init__(self, modules: Sequence[str]) -> None:
        """`modules`: what is imported once for all."""
        their_in, asks = os.pipe()
        answers, their_out = os.pipe()
        self._asks, self._answers = os.fdopen(asks, "w", buffering=1), os.fdopen(answers)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _DRIVER, str(their_in), str(their_out), *modules],
            stdin=subprocess.DEVNULL,
            pass_fds=(their_in, their_out),
        )
        os.close(their_in)
        os.close(their_out)

    def run(
        self,
        *args: str,
        input: str = "",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        seconds: int = 60,
        max_file_bytes: int | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` of the command with its output captured; `input` comes through a pipe. After `seconds` it
        is ended by SIGALRM. `max_file_bytes`: `ulimit -f`."""
        with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
            case: dict[str, Any] = {"args": args, "input": input, "env": dict(os.environ if env is None else env)}
            case |= {"cwd": str(cwd or Path.cwd()), "max_file_bytes": max_file_bytes, "seconds": seconds}
            self._asks.write(json.dumps(case | {"out": out.name, "err": err.name}) + "\n")
            status = int(self._answers.readline())
            return subprocess.CompletedProcess(
                ["gptq-api", *args], status, Path(out.name).read_text(), Path(err.name).read_text()
            )

    def refused(self, *flags: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
        """The exit status and the log of a server that is to leave before it serves; `env` beside what there is."""
        flags = ("--port", "0", "--num-threads", "1", *flags)
        done = self.run("serve", *flags, env={**os.environ, **(env or {})})
        assert "serving" not in done.stderr and "Traceback" not in done.stderr and not done.stdout, done
        return done.returncode, done.stderr

    def close(self) -> None:
        self._asks.close()
        self._process.wait()
        self._answers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
