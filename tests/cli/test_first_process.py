"""SIGTERM to the first process of a container, which Linux does not deliver where there is no handler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "pydantic":
            print("importing", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Slow())
sys.argv = ["gptq-api", *sys.argv[1:]]
from gptq_api.__main__ import main
main()
"""


@pytest.mark.parametrize(("command", "status"), [("serve", 0), ("quantize", 143)])
def test_the_first_process_ends_while_it_is_imported(command: str, status: int) -> None:
    here = ["unshare", "--pid", "--fork", "--kill-child"]
    try:
        subprocess.run([*here, "true"], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no namespace of processes can be made here")
    process = subprocess.Popen([*here, sys.executable, "-c", PROGRAM, command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "importing\n"
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
        assert process.wait(10) == status
    finally:
        process.kill()
        process.communicate()
