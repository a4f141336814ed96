"""Memory for weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptq_api.checkpoint.large_pages import weight_memory
from gptq_api.checkpoint.safetensors_file import SafetensorsFile
from tests.support.memory import huge_bytes


def test_tensors_lie_apart_and_aligned() -> None:
    tensors = [weight_memory((3, n), dtype) for n in (1, 5, 70_000) for dtype in (torch.uint8, torch.float32)]
    for i, tensor in enumerate(tensors):
        assert tensor.data_ptr() % 64 == 0
        assert not tensor.any()
        tensor.fill_(i + 1)
    assert all(bool((tensor == i + 1).all()) for i, tensor in enumerate(tensors))
    assert weight_memory((0, 4), torch.float16).shape == (0, 4)


def test_large_and_small_ones_lie_in_large_pages() -> None:
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this system gives no large pages")
    before = huge_bytes()
    kept = [weight_memory((2**20,), torch.uint8).fill_(1) for _ in range(24)]
    kept.append(weight_memory((40 * 2**20,), torch.uint8).fill_(1))
    assert huge_bytes() - before >= 60 * 2**20


def test_more_than_there_is_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        weight_memory((2**60,), torch.uint8)


def test_a_large_tensor_is_read_by_several_threads(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    data = torch.randint(0, 256, (21 * 2**20 + 3,), dtype=torch.uint8)
    save_file({"a": data[:5].clone(), "b": data}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert torch.equal(file.read("b", weight_memory), data)
    assert torch.equal(file.read("b"), data)
