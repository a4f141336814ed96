"""Loading on the CPU: what it takes beside the weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptq_api.bench.synthetic import SHAPES, write_folder
from gptq_api.runner.cpu import native
from gptq_api.runner.cpu.packed_cache import SETTLED_S
from tests.support.server import Server, chat_body, wait_for

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.MISSING)
MEASURE = """
import sys, threading
from gptq_api.runner.cpu import packed_cache
from gptq_api.runner.load import load_runner
from gptq_api.runner.options import LoadOptions
from tests.support.memory import forget_most, most_bytes
packed_cache.SETTLED_S = -1
options = {"device": "cpu", "num_threads": 2, "kv_cache_mib": 4, "max_model_len": 16}
load_runner(LoadOptions(**options))
for cache in sys.argv[2:]:
    before = most_bytes()
    runner = load_runner(LoadOptions(model_path=sys.argv[1], packed_cache=cache, **options))
    print(most_bytes() - before, runner.weight_bytes)
    del runner
    for thread in threading.enumerate():
        if thread.name == "packed-cache":
            thread.join(30)
    forget_most()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 62 MiB of embedding and head, and 84 of quantized weights, which is enough to be kept."""
    found = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "short", {**SHAPES["tinyllama-1.1b"], "vocab_size": 8000, "num_hidden_layers": 4})
        write_folder("short", found)
    return found


def test_weights_never_lie_in_memory_twice(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(folder), "off", str(tmp_path / "cache"), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for line in done.stdout.splitlines():
        held, weights = map(int, line.split())
        assert held < 1.25 * weights + 32 * 2**20, (held, weights)  # a module on its way, pages that are not full


def test_an_engine_that_is_started_again_packs_nothing(folder: Path, tmp_path: Path) -> None:
    newest = max(file.stat().st_ctime for file in folder.iterdir())
    time.sleep(max(0.0, newest + SETTLED_S - time.time()))
    flags = ("--packed-cache", str(tmp_path / "cache"))
    with Server("--model-path", str(folder), "--restart-engine", "1", "--kv-cache-mib", "4", *flags) as server:
        question = chat_body("Hello", max_tokens=4, ignore_eos=True, temperature=0)
        expected = server.post("/v1/chat/completions", question).json()["choices"]
        assert "packed by an earlier start" not in server.log()
        wait_for(lambda: list((tmp_path / "cache").glob("*.packed")), 10)
        os.kill(server.engine_pid, signal.SIGKILL)
        wait_for(lambda: "the engine is ready again" in server.log(), 20)
        assert server.post("/v1/chat/completions", question).json()["choices"] == expected
        assert "as packed by an earlier start" in server.log()
