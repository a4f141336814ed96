"""Damaged and invented checkpoints: every one loads or is refused with a CheckpointError, within the file's
memory."""

from __future__ import annotations

import contextlib
import json
import math
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_api.checkpoint.checkpoint import CheckpointError, open_checkpoint
from gptq_api.checkpoint.quant_config import parse_quant_config
from gptq_api.checkpoint.summary import summarise
from tests.checkpoint.test_checkpoint import load
from tests.support.checkpoints import RandomModel, Recipe, random_model, write_checkpoint
from tests.support.layouts import LAYOUTS

pytestmark = pytest.mark.slow

LAYOUT_NAMES = (
    "GPTQModel v1, asymmetric",
    "GPTQ-for-LLaMa before 2023-03-20, 4 bits",
    "TGI",
    "AutoGPTQ, metadata alone",
)


def read_all(folder: Path) -> None:
    """All that `inspect` and loading read."""
    checkpoint = open_checkpoint(folder)
    summarise(checkpoint)
    for module in checkpoint.modules:
        checkpoint.gptq(module)


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return random_model(Recipe(num_layers=1, act_order=True, sym=False))


@pytest.fixture(scope="module")
def folder(model: RandomModel) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield write_checkpoint(Path(path), model)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_bytes_of_a_header(data: st.DataObject, model: RandomModel, folder: Path) -> None:
    file = write_checkpoint(folder, model) / "model.safetensors"
    content = bytearray(file.read_bytes())
    (header,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 7 + header))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        read_all(folder)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_flipped_bytes_of_a_pickle(data: st.DataObject, model: RandomModel, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("pickle")
    file = write_checkpoint(folder, model, container="pt") / "llama-4bit-32g.pt"
    content = bytearray(file.read_bytes())
    # The pickle itself stands at the front, the directory of the zip file at the end.
    places = st.one_of(st.integers(0, 6000), st.integers(len(content) - 6000, len(content) - 1))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(places)] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        read_all(folder)


def _noise(num_bytes: int, seed: int) -> Tensor:
    return torch.randint(0, 128, (num_bytes,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


CHANGES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "flat": lambda t, n: t.flatten(),
    "turned": lambda t, n: t.t() if t.ndim == 2 else t.unsqueeze(0),
    "cut": lambda t, n: t[: max(0, t.shape[0] - n)],
    "narrow": lambda t, n: t[..., : max(0, t.shape[-1] - n)],
    "repeated": lambda t, n: t.repeat(n + 1, *[1] * (t.ndim - 1)),
    "float": lambda t, n: t.float(),
    "double": lambda t, n: t.double(),
    "int": lambda t, n: t.to(torch.int32),
    "long": lambda t, n: t.to(torch.int64),
    "byte": lambda t, n: t.to(torch.uint8),
    "bool": lambda t, n: t.bool(),
    "float8": lambda t, n: t.float().to(torch.float8_e4m3fn),
    "complex": lambda t, n: t.to(torch.complex64),
    "noise": lambda t, n: _noise(t.nbytes, n).view(t.dtype).view(t.shape),
    "huge": lambda t, n: torch.full_like(t, torch.finfo(t.dtype).max) if t.is_floating_point() else t.fill_(100),
    "infinite": lambda t, n: t.fill_(math.inf) if t.is_floating_point() else (t.long() * 0 - 1).to(t.dtype),
    "one number": lambda t, n: t.flatten()[0].clone(),
    "empty": lambda t, n: t[:0],
}


@settings(max_examples=50, deadline=None)
@given(
    edits=st.lists(
        st.tuples(
            st.sampled_from(("qweight", "qzeros", "scales", "g_idx", "zeros", "bias", "weight")),
            st.sampled_from(("q_proj", "down_proj", "embed_tokens", "norm", "lm_head")),
            st.sampled_from(("drop", "rename", *CHANGES)),
            st.integers(1, 40),
        ),
        min_size=1,
        max_size=3,
    ),
    layout=st.sampled_from(LAYOUT_NAMES),
)
def test_edited_tensors(edits: list[tuple[str, str, str, int]], layout: str, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("edited")
    chosen = LAYOUTS[layout]
    chosen.write(folder, random_model(chosen.recipe))
    file = next(f for f in folder.iterdir() if f.suffix in (".pt", ".safetensors"))
    tensors = torch.load(file) if file.suffix == ".pt" else load_file(file)
    for part, kind, change, n in edits:
        for name in [name for name in tensors if name.endswith(part) and kind in name]:
            tensor = tensors.pop(name)
            if change == "rename":
                tensors[name.replace(part, "zeros" if part != "zeros" else "qzeros")] = tensor
            elif change != "drop":
                tensors[name] = CHANGES[change](tensor.clone(), n).contiguous()
    if file.suffix == ".pt":
        torch.save(tensors, file)
    else:
        save_file({name: t.clone() for name, t in tensors.items()}, file)
    with contextlib.suppress(CheckpointError):
        load(folder)


values = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2)),
    st.sampled_from(["gptq", "gptq_v2", "auto-round", "auto_round:gptq", "-1", "int32"]),
)
objects = st.dictionaries(st.text(max_size=12), st.one_of(values, st.dictionaries(st.text(max_size=5), values)))
keys = st.sampled_from(
    (
        *("bits", "w_bit", "group_size", "desc_act", "sym", "quant_method", "method", "format", "checkpoint_format"),
        *("version", "dynamic", "extra_config", "lm_head", "pack_dtype", "packing_format", "backend"),
        "is_marlin_format",
    )
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(keys, st.one_of(values, objects), max_size=5))
def test_any_quantization_config(raw: dict[str, Any]) -> None:
    with contextlib.suppress(CheckpointError):
        parse_quant_config(raw, "quantize_config.json")


@settings(max_examples=60, deadline=None)
@given(raw=st.one_of(values, objects, st.dictionaries(st.just("weight_map"), st.one_of(values, objects))))
def test_any_index(tmp_path_factory: Any, raw: Any) -> None:
    folder = tmp_path_factory.mktemp("index")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from gptq_api.checkpoint.checkpoint import CheckpointError, open_checkpoint
from gptq_api.checkpoint.summary import summarise
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in sys.argv[1:]:
    try:
        checkpoint = open_checkpoint(Path(folder))
        summarise(checkpoint)
        for module in checkpoint.modules:
            checkpoint.gptq(module)
        print("read", flush=True)
    except CheckpointError as error:
        print("refused", flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, flush=True)
"""


def test_memory_is_bounded_by_the_file(model: RandomModel, tmp_path: Path) -> None:
    large = random_model(Recipe(num_layers=1, hidden_size=1024, intermediate_size=4096, num_heads=8, act_order=True))
    honest = [write_checkpoint(tmp_path / c, large, container=c) for c in ("safetensors", "pt")]
    size = sum(f.stat().st_size for f in honest[0].iterdir())
    tensors = model.tensors()
    module = "model.layers.0.mlp.up_proj"
    tensors[f"{module}.qweight"] = torch.zeros(1, dtype=torch.int32).expand(2**33, 160)
    pretending = write_checkpoint(tmp_path / "pretending", model, container="pt", tensors=tensors)
    command = [sys.executable, "-c", MEASURE, str(pretending), *map(str, honest)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    assert lines[::2] == ["refused", "read", "read"]
    kib = [int(line) for line in lines[1::2]]
    assert size > 8 * 2**20
    assert kib[0] < 16 * 2**10
    assert kib[-1] * 1024 < 2 * size + 16 * 2**20
