"""torch without the parts that the engine never asks for: its models need none of them, and who asks gets all."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

NAMES = """
import json, sys
from gptq_api.engine import torch_parts
if sys.argv[1] == "later":
    torch_parts.load_when_asked()
import torch
from importlib import import_module
if sys.argv[1] == "later":
    assert all(type(sys.modules[part]) is torch_parts._Part for part in torch_parts.PARTS)
    assert not hasattr(torch.export, "no_such_name"), "asking loads it"
    assert type(torch.export) is not torch_parts._Part
    import torch.optim.lr_scheduler
    assert "Adam" in vars(torch.optim), "a package is loaded before what is in it"
names = {}
for part in sorted(torch_parts.PARTS):
    module = import_module(part)
    getattr(module, "something", None)
    names[part] = sorted(name for name in vars(module) if name != "something")
print(json.dumps(names))
"""

ANSWERS = """
import sys
from gptq_api.engine import torch_parts
torch_parts.load_when_asked()
from gptq_api.runner.load import load_runner
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.solo import lone_step
for dtype, kernels in (("auto", True), ("float32", False)):
    if not kernels:
        from gptq_api.runner.cpu import native
        native._cpu = None
    runner = load_runner(LoadOptions(model_path="demo", device="cpu", dtype=dtype, num_blocks=20))
    runner.collect(runner.launch(lone_step(5, 3, runner.block_size)))
print([part for part in torch_parts.PARTS if type(sys.modules[part]) is not torch_parts._Part])
"""


def output(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_part_that_is_asked_for_is_all_there() -> None:
    later, at_once = (json.loads(output(NAMES, when)) for when in ("later", "at once"))
    found: dict[str, Any] = later
    assert found == at_once and all(found.values())


def test_a_model_needs_none_of_them() -> None:
    assert output(ANSWERS) == "[]\n"
