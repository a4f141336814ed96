"""examples/ray_serve.py, run by Ray Serve in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients import environments
from tests.support.gateway import free_port

PROGRAM = Path(__file__).parent / "programs" / "ray_replicas.py"


@pytest.mark.timeout(400)
def test_the_example_answers_as_a_server_does(tmp_path: Path) -> None:
    python = environments.folder("ray") / "bin" / "python"
    root = environments.ROOT
    env = {
        **os.environ,
        "COMMAND": f"{sys.executable} -m gptq_api",
        "EXAMPLES": str(root / "examples"),
        "PYTHONPATH": f"{root}:{root / 'examples'}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "REPLICAS": "2",
    }
    ran = subprocess.run(
        [str(python), str(PROGRAM), str(free_port())],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=350,
    )
    assert ran.returncode == 0 and ran.stdout.endswith("done\n"), ran.stdout[-2000:] + ran.stderr[-4000:]
