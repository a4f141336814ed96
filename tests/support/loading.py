"""A server whose model takes as long to load as a test wants."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from tests.support.server import START_S, Server, wait_for

_WAITS = """
import os, sys, time
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r} and {process!r} in " ".join(sys.orig_argv):
            while not os.path.exists({go!r}):
                time.sleep(0.02)
sys.meta_path.insert(0, Finder())
"""
"""what the engine's process does before it imports a module that it needs"""


class LoadingServer(Server):
    """The port is open when the block begins, and the model is loaded after `go`."""

    def __init__(
        self, folder: Path, *flags: str, waits_for: str = "gptq_api.runner.load", process: str = "engine.process"
    ) -> None:
        """`waits_for`: a module that a child process of ours, `process`, imports before it can load anything."""
        self._go = folder / "go"
        site = folder / "site"
        site.mkdir()
        code = _WAITS.format(module=waits_for, process=process, go=str(self._go))
        (site / "sitecustomize.py").write_text(code)
        self._folders = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        super().__init__(*flags, env={"PYTHONPATH": self._folders}, port=port, wait=False)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        try:
            wait_for(self._is_open, START_S)
        except BaseException:
            print(self.log())
            self.close()
            raise

    def go(self) -> None:
        self._go.touch()

    def run_beside(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another command that loads a model in the same way."""
        command: list[Any] = [sys.executable, "-m", "gptq_api", *arguments]
        env = {**os.environ, "PYTHONPATH": self._folders}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)

    def _is_open(self) -> bool:
        assert self.process.poll() is None, self.log()
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0
