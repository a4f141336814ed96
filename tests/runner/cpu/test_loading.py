"""Loading on the CPU: what it takes beside the weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gptq_api.bench.synthetic import SHAPES, write_folder

MEASURE = """
import sys
from gptq_api.runner.load import load_runner
from gptq_api.runner.options import LoadOptions
from tests.support.memory import most_bytes
options = {"device": "cpu", "num_threads": 2, "kv_cache_mib": 4, "max_model_len": 16}
load_runner(LoadOptions(**options))
before = most_bytes()
runner = load_runner(LoadOptions(model_path=sys.argv[1], **options))
print(most_bytes() - before, runner.weight_bytes)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 1024 x 2 layers with 98 MB of embedding and head, and 18 of quantized weights."""
    found = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "wide", {**SHAPES["tinyllama-1.1b"], "hidden_size": 1024, "num_hidden_layers": 2})
        write_folder("wide", found)
    return found


def test_weights_never_lie_in_memory_twice(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    held, weights = map(int, done.stdout.split())
    assert held < 1.1 * weights + 24 * 2**20, (held, weights)  # a module on its way, pages that are not full
