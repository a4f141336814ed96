"""The image's health check, beside servers that listen where it was not told."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Server, wait_for

SCRIPT = Path(__file__).parents[2] / "deploy" / "healthcheck.py"


@pytest.fixture
def check() -> Iterator[Any]:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("healthcheck", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


def asked(check: Any, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What it says of this server alone; others may be running on this machine."""
    assert server.process.pid in check.servers()
    monkeypatch.setattr(check, "servers", lambda: [server.process.pid])
    status, said = check.main(), capsys.readouterr().out
    assert status == bool(said)
    return str(said)


@pytest.mark.parametrize("way", ["command line", "variable", "file"])
def test_it_finds_the_port_wherever_it_was_set(
    way: str,
    check: Any,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "c.toml").write_text(f"port = {port}\nhost = '127.0.0.1'\nnum_threads = 1\n")
    others: dict[str, tuple[list[str], dict[str, str]]] = {
        "variable": (["serve", "--num-threads", "1"], {"GPTQ_API_PORT": str(port)}),
        "file": (["serve", "--config", str(tmp_path / "c.toml")], {}),
    }
    with ExitStack() as stack:
        found = server  # which was told on the command line
        if way in others:
            command, variables = others[way]
            found = stack.enter_context(Server(command=command, env=variables))
        assert {place[1] for place in check.listens(found.process.pid)} == {found.port}
        assert asked(check, found, monkeypatch, capsys) == ""


def test_a_server_that_is_stopped_drains_or_loads_is_not_ready(
    check: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "SECONDS", 0.5)
    with Server("--drain-delay-s", "60", wait=False) as server:
        wait_for(lambda: server.process.pid in check.servers(), 20)
        assert asked(check, server, monkeypatch, capsys) != ""
        server.wait_ready()
        assert asked(check, server, monkeypatch, capsys) == ""
        server.signal(signal.SIGSTOP)
        assert "timed out" in asked(check, server, monkeypatch, capsys)
        server.signal(signal.SIGCONT)
        server.signal(signal.SIGTERM)
        wait_for(lambda: "/ready says 503" in asked(check, server, monkeypatch, capsys), 20)


def test_where_no_server_runs_it_says_so(check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "PROC", tmp_path)
    assert check.servers() == [] and check.main() == 1


def test_addresses_are_read_as_the_kernel_writes_them(check: Any) -> None:
    with socket.socket() as one, socket.socket(socket.AF_INET6) as other, socket.socket() as everywhere:
        one.bind(("127.0.0.3", 0))
        other.bind(("::1", 0))
        everywhere.bind(("0.0.0.0", 0))
        for sock in (one, other, everywhere):
            sock.listen()
        places = [("127.0.0.3", one), ("::1", other), ("127.0.0.1", everywhere)]
        assert {(host, sock.getsockname()[1]) for host, sock in places} <= {*check.listens(os.getpid())}


def test_it_is_quick() -> None:
    """It is run every ten seconds; whatever it imports is paid for each time."""
    program = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); print(len(sys.modules))"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200
