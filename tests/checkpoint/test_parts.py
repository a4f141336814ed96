"""Some outputs of a Linear, read from any layout, are those of the whole; ranks read what each keeps, and no byte twice
that only one of them needs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_api.checkpoint import parts, safetensors_file
from gptq_api.checkpoint.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from gptq_api.checkpoint.parts import Region, TensorPart
from gptq_api.model.loader import load_llama
from gptq_api.model.modules import all_modules, config_of
from gptq_api.model.shard import WHOLE, Shard, outputs
from gptq_api.model.weights import LlamaWeights
from gptq_api.runner.cpu.backend import CpuBackend
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.layouts import LAYOUTS

CPU = torch.device("cpu")
RANGES = {
    "one": (range(16, 48),),
    "three": (range(8), range(24, 40), range(56, 64)),
    "uneven": (range(3, 21), range(30, 31)),
    "all": (range(64),),
}


WAYS = {"by run": 1, "by row": 2**20}
"""gaps that are read over: tensors of these sizes are read by whole rows; here in pieces of few as well"""


def read_by(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_GAP", WAYS[way])
    monkeypatch.setattr(safetensors_file, "_PIECE", 300)
    monkeypatch.setattr(safetensors_file, "_ROOM", 600)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    way: str = request.param
    read_by(way, monkeypatch)
    return way


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_of_every_layout_are_those_of_the_whole(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LAYOUTS[layout].write(tmp_path, random_model(LAYOUTS[layout].recipe))
    checkpoint = open_checkpoint(tmp_path)
    for module in checkpoint.modules:
        whole = checkpoint.gptq(module)
        for way, ranges in itertools.product(WAYS, RANGES.values()):
            if ranges[-1].stop > whole.out_features:
                continue
            read_by(way, monkeypatch)
            chosen = torch.tensor([i for each in ranges for i in each])
            found = checkpoint.gptq(module, ranges)
            for name in ("qweight", "zeros", "scales"):
                tensor = getattr(found, name)
                assert torch.equal(tensor, getattr(whole, name)[:, chosen]) and tensor.is_contiguous(), name
            assert torch.equal(found.g_idx, whole.g_idx) and found.group_size == whole.group_size
            assert (found.bias is None) == (whole.bias is None)
            assert whole.bias is None or torch.equal(found.bias, whole.bias[chosen])  # type: ignore[arg-type]
        monkeypatch.undo()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("container", ["safetensors", "sharded", "pt"])
def test_rows_and_outputs_of_any_bits(way: str, bits: int, container: str, tmp_path: Path) -> None:
    recipe = Recipe(bits=bits, act_order=True, sym=False, dense=("o_proj",), attention_bias=True)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, random_model(recipe), container=container))
    for ranges in RANGES.values():
        chosen = torch.tensor([i for each in ranges for i in each])
        found, whole = (checkpoint.gptq("model.layers.1.mlp.down_proj", each) for each in (ranges, None))
        assert torch.equal(found.zeros, whole.zeros[:, chosen]) and torch.equal(found.qweight, whole.qweight[:, chosen])
        name, shape = "model.layers.0.self_attn.o_proj.weight", (64, 64)
        assert torch.equal(checkpoint.tensor(name, shape, ranges), checkpoint.tensor(name, shape)[chosen])


def test_pieces_of_a_region_are_its_bytes() -> None:
    """Whatever byte a piece begins at."""
    data = torch.arange(6 * 40, dtype=torch.uint8).view(6, 40)
    part = TensorPart(1, (range(3, 9), range(20, 21), range(33, 40)))
    region, expected = Region.of(0, (6, 40), 1, part), part.of(data).flatten().tolist()
    assert region.num_bytes == len(expected) == 6 * 14
    for at in range(len(expected)):
        for length in (1, 5, 14, 33):
            runs = region.runs_from(at, min(length, len(expected) - at))
            found = [i for position, count in runs for i in range(position, position + count)]
            assert found == expected[at : at + length]
    assert region.piece(30) == 28 and region.piece(13) == 13


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many bytes each reading of a file has brought."""
    found: list[int] = []
    preadv = os.preadv

    def counting(fd: int, buffers: Any, offset: int) -> int:
        count = preadv(fd, buffers, offset)
        found.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counting)
    yield found


def loaded(checkpoint: Checkpoint, shard: Shard) -> LlamaWeights:
    backend = CpuBackend(CPU, torch.bfloat16, rounds=True)
    return load_llama(checkpoint, config_of(checkpoint), 64, backend, shard)[0]


def stored(checkpoint: Checkpoint, name: str) -> int:
    dtype = checkpoint.store.dtype(name)
    assert dtype is not None
    return checkpoint.store.numel(name) * dtype.itemsize


BASE = Recipe(num_heads=4, num_kv_heads=4, vocab_size=128)
RECIPES = {
    "plain": BASE,
    "act-order": replace(BASE, act_order=True, sym=False),
    "tied": replace(BASE, tie=True),
    "quantized head": replace(BASE, quantize_head=True),
    "qwen2": replace(BASE, family="qwen2"),
    "qwen3": replace(BASE, family="qwen3", head_dim=32),
    "phi3, fused": replace(BASE, family="phi3", head_dim=32, more_config={"pad_token_id": 0}),
    "unquantized o and down": replace(BASE, dense=("o_proj", "down_proj")),
    "8 and 2 bits": replace(BASE, bits=8, mixed_bits={"down_proj": 2}),
}


@pytest.mark.parametrize("container", ["safetensors", "sharded"])
@pytest.mark.parametrize("name", RECIPES)
def test_ranks_read_each_byte_once_but_what_all_need(
    name: str, container: str, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_GAP", 1)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, random_model(RECIPES[name]), container=container))
    wanted = {"embed_tokens.weight", "norm.weight", "layernorm.weight", "g_idx", "bias"}
    shared = [each for each in checkpoint.store.names if each.endswith(tuple(wanted))]
    own = [each for each in checkpoint.store.names if each not in shared]
    for size in (1, 2, 4):
        counted.clear()
        for rank in range(size):
            loaded(checkpoint, Shard(rank, size))
        expected = sum(stored(checkpoint, each) for each in own) + size * sum(
            stored(checkpoint, each) for each in shared
        )
        assert sum(counted) == expected, size


def test_rows_of_some_kilobytes_are_read_in_part(tmp_path: Path, counted: list[int]) -> None:
    """As the sizes of real models have it, with nothing changed: gate has rows of 128 KiB."""
    recipe = replace(BASE, intermediate_size=32768, num_layers=1)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, random_model(recipe)))
    name, table = "model.layers.0.mlp.gate_proj", dict(all_modules(config_of(checkpoint)))
    qweight = stored(checkpoint, f"{name}.qweight")
    for size in (2, 4):
        for rank in range(size):
            counted.clear()
            checkpoint.gptq(name, outputs(config_of(checkpoint), table[name], Shard(rank, size)))
            assert qweight / size < sum(counted) < 1.5 * qweight / size


def test_a_rank_has_its_rows_of_the_head(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, random_model(BASE)))
    heads: list[Any] = [loaded(checkpoint, shard).lm_head for shard in (WHOLE, Shard(0, 2), Shard(1, 2))]
    assert torch.equal(torch.cat((heads[1].weight, heads[2].weight)), heads[0].weight)


def test_a_file_that_shrinks_is_an_error(way: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, random_model(BASE))
    checkpoint, file = open_checkpoint(folder), folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-60000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        loaded(checkpoint, Shard(1, 2))
