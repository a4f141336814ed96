"""The forward pass of ext/cpu beside the one in plain torch, with the same quantized products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptq_api.checkpoint.checkpoint import open_checkpoint
from gptq_api.model.loader import load_llama
from gptq_api.model.modules import config_of
from gptq_api.model.weights import LlamaWeights
from gptq_api.runner.cpu import native, native_forward
from gptq_api.runner.cpu.attention import KVCache, Span
from gptq_api.runner.cpu.backend import CpuBackend
from gptq_api.runner.cpu.forward import PlainLlama
from gptq_api.runner.cpu.native_forward import BlockCache, NativeLlama
from tests.support.checkpoints import Recipe, random_model, write_checkpoint

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.MISSING)

LENGTH, BLOCKS = 200, 16
QWEN3 = {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1}
MODELS = {
    "grouped": (Recipe(act_order=True, sym=False), 16),
    "every head its own, blocks of 32": (Recipe(num_kv_heads=4), 32),
    "16 to one, blocks of 64": (Recipe(hidden_size=256, num_heads=16, num_kv_heads=1, group_size=64), 64),
    "40 to one": (Recipe(hidden_size=640, num_heads=40, num_kv_heads=1), 16),
    "head of 48, blocks of 128": (
        Recipe(hidden_size=144, num_heads=3, num_kv_heads=1, head_dim=48, group_size=48),
        128,
    ),
    "biases, tied, bfloat16": (Recipe(family="qwen2", tie=True, float_dtype=torch.bfloat16), 16),
    "more biases": (Recipe(attention_bias=True, mlp_bias=True), 16),
    "norms of heads, a window": (Recipe(family="qwen3", head_dim=32, more_config=QWEN3), 16),
    "a short window": (Recipe(family="mistral", more_config={"sliding_window": 5}), 16),
    "orders of their own": (Recipe(act_order=True, own_order=("q_proj", "up_proj")), 16),
    "bits of their own": (Recipe(mixed_bits={"k_proj": 8, "down_proj": 3, "gate_proj": 2}), 16),
}


def loaded(folder: Path) -> LlamaWeights:
    checkpoint = open_checkpoint(folder, None)
    return load_llama(
        checkpoint, config_of(checkpoint), 256, CpuBackend(torch.device("cpu"), torch.bfloat16, rounds=True)
    )[0]


def models(folder: Path, block_size: int) -> tuple[PlainLlama, NativeLlama]:
    """Both of the same weights, with caches in float32."""
    weights = loaded(folder)
    config = weights.config
    assert native_forward.takes(weights, block_size)
    layers, kv_heads, dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    plain = PlainLlama(weights, KVCache(torch.zeros(layers, BLOCKS, block_size, 2, kv_heads, dim)))
    cache = torch.zeros(layers, BLOCKS, kv_heads, 2, dim * block_size)
    return plain, NativeLlama(weights, BlockCache(cache, block_size))


def logits(model: PlainLlama | NativeLlama, ids: list[int], chunks: list[int], blocks: list[int]) -> torch.Tensor:
    found, start = [], 0
    for n in chunks:
        x, first = model.forward([ids[start : start + n]], [Span(start, n, blocks)])
        found.append(model.logits(x, [first[0] + i for i in range(n)]))
        start += n
    return torch.cat(found)


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PlainLlama, NativeLlama]:
    recipe, block_size = MODELS[request.param]
    return models(write_checkpoint(tmp_path, random_model(recipe)), block_size)


@torch.inference_mode()
def test_it_is_the_forward_pass_in_torch(pair: tuple[PlainLlama, NativeLlama]) -> None:
    plain, ours = pair
    ids = torch.randint(3, 96, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    blocks = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(2)).tolist()
    expected = logits(plain, ids, [LENGTH], blocks)
    found = logits(ours, ids, [LENGTH], blocks)
    # A last bit before the rounding to int8 is a whole step of it at times.
    assert float((found - expected).norm() / expected.norm()) < 4e-3
    for chunks in ([1] * LENGTH, [63, 1, 64, 72], [7] * 28 + [4]):
        assert torch.equal(logits(ours, ids, chunks, blocks), found), chunks


@torch.inference_mode()
def test_a_sequence_does_not_see_its_neighbours(pair: tuple[PlainLlama, NativeLlama]) -> None:
    _, ours = pair
    size = ours.cache.block_size
    each = BLOCKS * size // 4 // size
    texts = [[(5 * i + 7 * k) % 90 + 3 for k in range(n)] for i, n in enumerate((9, 33, 1, 60))]
    tables = [list(range(each * i, each * (i + 1))) for i in range(4)]
    texts = [ids[: each * size] for ids in texts]
    alone = [logits(ours, ids, [len(ids)], table) for ids, table in zip(texts, tables, strict=True)]
    x, first = ours.forward(texts, [Span(0, len(ids), table) for ids, table in zip(texts, tables, strict=True)])
    for expected, row, ids in zip(alone, first, texts, strict=True):
        assert torch.equal(ours.logits(x, list(range(row, row + len(ids)))), expected)


@torch.inference_mode()
def test_what_a_step_must_not_ask_for(tmp_path: Path) -> None:
    _, ours = models(write_checkpoint(tmp_path, random_model(Recipe())), 16)
    wrong: dict[str, tuple[list[int], Span]] = {
        "token 96 is none of the 96": ([96], Span(0, 1, [0])),
        "token -1 is none": ([-1], Span(0, 1, [0])),
        "block 16 is none of the 16": ([5], Span(0, 1, [16])),
        "position 16 is beyond the 1 blocks": ([5], Span(16, 1, [0])),
        "has no tokens": ([], Span(3, 0, [0])),
        "are not those of the step": ([5, 6], Span(0, 1, [0])),
    }
    for message, (ids, span) in wrong.items():
        with pytest.raises(ValueError, match=message):
            ours.forward([ids], [span])


def test_a_tied_head_counts_once(tmp_path: Path) -> None:
    tied = loaded(write_checkpoint(tmp_path, random_model(Recipe(tie=True, float_dtype=torch.bfloat16))))
    linears = [linear for layer in tied.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    assert tied.num_bytes == sum(linear.num_bytes for linear in linears) + 2 * tied.embedding.numel()


def test_who_takes_the_torch_path(tmp_path: Path) -> None:
    recipe = Recipe(dense=("o_proj",))
    assert not native_forward.takes(loaded(write_checkpoint(tmp_path, random_model(recipe))), 16)
