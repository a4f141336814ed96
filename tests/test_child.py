"""Child processes of ours end with their parent, whatever state they are in, and their lines are of its kind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import Server, alive, chat_body, wait_for

PARENT = """
import subprocess, sys, time
from gptq_api.child import child_command
from gptq_api.logs import Style
child = subprocess.Popen(child_command("sleeper", style=Style("info", True)), start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""

SLEEPER = """
import time, warnings
def main():
    warnings.warn("of the child")
    print("asleep", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("stop", [False, True])
def test_a_child_ends_with_its_parent(stop: bool, tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command, env = [sys.executable, "-c", PARENT], {**os.environ, "PYTHONPATH": path}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env) as parent:
        assert parent.stdout is not None and parent.stderr is not None
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == "asleep\n"
        assert "of the child" in json.loads(parent.stderr.readline())["event"]
        if stop:
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
    wait_for(lambda: not alive(pid), 5)


def test_a_child_whose_parent_is_gone_before_it_can_ask_leaves() -> None:
    command = [sys.executable, "-m", "gptq_api.child", "1", "info", "text", "antigravity"]
    assert subprocess.run(command, timeout=30, check=False).returncode == 0


def test_a_stopped_engine_and_a_stopped_checker_do_not_outlive_their_server() -> None:
    with Server() as server:
        assert server.chat(max_tokens=2, response_format={"type": "json_object"}).status_code == 200
        children = server.children()
        assert len(children) >= 2
        for pid in children:
            os.kill(pid, signal.SIGSTOP)
        server.process.kill()
        server.wait(5)
        wait_for(lambda: not any(map(alive, children)), 5)


def test_a_terminals_interrupt_is_for_the_server_alone() -> None:
    with Server() as server:
        assert {os.getpgid(pid) for pid in server.children()}.isdisjoint({os.getpgid(server.process.pid)})
        assert server.post("/v1/chat/completions", chat_body(max_tokens=1)).status_code == 200
