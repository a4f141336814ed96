"""A server in a container, for tests and benchmarks: docker's or podman's, with nothing that it does not need."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from types import TracebackType
from typing import Any, Self

import httpx

from tests.support.server import wait_for

IMAGE = os.environ.get("IMAGE", "gptq-api:cpu")
FEW = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")
"""where this user may raise no limit, not even to what it is"""
WAYS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("docker",), ()),
    (("podman",), ()),
    (("podman",), FEW),
    (("podman", "--runtime", "runc"), FEW),
)
"""the engine, and options of its `run`, from the plainest on"""
LOCKED = ("--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges")
"""what a careful operator says"""


class NoEngineError(Exception):
    """Why no container can be run here."""


def engine(image: str = IMAGE) -> tuple[list[str], list[str]]:
    """The first of WAYS that runs the image. Raises NoEngineError."""
    why = "neither docker nor podman is on PATH"
    for program, options in WAYS:
        if shutil.which(program[0]) is None:
            continue
        has = subprocess.run([program[0], "image", "inspect", image], capture_output=True, check=False)
        if has.returncode:
            why = f"there is no image {image}: make image"
            continue
        command = [*program, "run", "--rm", *options, "--entrypoint", "true", image]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            only = (
                ("--read-only-tmpfs=false",) if program[0] == "podman" else ()
            )  # podman's own /tmp, /run and /var/tmp
            return [*program], [*options, *only]
        why = f"{program[0]} cannot run containers here: {done.stderr.strip()[-300:]}"
    raise NoEngineError(why)


class Container:
    """`with Container(engine(), "--user", "12345:0", arguments=("serve",)) as running:`; gone when the block ends."""

    def __init__(
        self,
        found: tuple[list[str], list[str]],
        *options: str,
        arguments: tuple[str, ...] = ("serve",),
        port: int = 8000,
        env: dict[str, str] | None = None,
        image: str = IMAGE,
        wait: bool = True,
    ) -> None:
        """`port` is the one the server listens on inside."""
        self._program, run = found
        variables = {"GPTQ_API_ALLOW_UNAUTHENTICATED": "true"} if env is None else env
        told = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
        command = [*self._program, "run", "--detach", "--publish", f"127.0.0.1::{port}", *run, *LOCKED, *options, *told]
        self.began = time.monotonic()
        done = subprocess.run([*command, image, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(done.stderr)
        self.id = done.stdout.split()[-1]
        try:
            published = self._say("port", self.id).split()[-1]
            self.http = httpx.Client(base_url=f"http://{published}", timeout=60, trust_env=False)
            if wait:
                wait_for(self.is_ready, 60)
                self.ready_s = time.monotonic() - self.began
        except BaseException:
            print(self.log())
            self.close()
            raise

    def is_ready(self) -> bool:
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.HTTPError:
            if not self.inspect()["State"]["Running"]:
                raise AssertionError(f"the server left:\n{self.log()}") from None
            return False

    def _say(self, *words: str) -> str:
        return subprocess.run([*self._program, *words], capture_output=True, text=True, check=True).stdout

    def inspect(self) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self._say("inspect", self.id))
        return found[0]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command inside."""
        return subprocess.run([*self._program, "exec", self.id, *command], capture_output=True, text=True, check=False)

    def log(self) -> str:
        done = subprocess.run([*self._program, "logs", self.id], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def signal(self, number: int = signal.SIGTERM) -> None:
        self._say("kill", "--signal", str(number), self.id)

    def wait(self) -> int:
        """Its exit status."""
        return int(self._say("wait", self.id).split()[-1])

    def stop(self, grace_s: int) -> tuple[float, int]:
        """As an orchestrator does: SIGTERM, and SIGKILL when the grace is over. (seconds, exit status)"""
        began = time.monotonic()
        self._say("stop", "--time", str(grace_s), self.id)
        return time.monotonic() - began, int(self.inspect()["State"]["ExitCode"])

    def close(self) -> None:
        subprocess.run([*self._program, "rm", "--force", "--volumes", self.id], capture_output=True, check=False)
        if hasattr(self, "http"):
            self.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            print(self.log())
        self.close()


def image_config(found: tuple[list[str], list[str]], image: str = IMAGE) -> dict[str, Any]:
    """What the engine says of an image."""
    command = [found[0][0], "image", "inspect", image]
    told: list[dict[str, Any]] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return told[0]


def unpacked(found: tuple[list[str], list[str]], image: str = IMAGE) -> int:
    """Bytes of the files in the image, as `du` counts them, a file that two layers have once."""
    program, options = found
    command = [*program, "run", "--rm", "--user", "0", *options, "--entrypoint", "du", image]
    ignored = [f"--exclude={place}" for place in ("/proc", "/sys", "/dev")]
    done = subprocess.run(
        [*command, "--one-file-system", "--bytes", "--summarize", *ignored, "/"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[0])
