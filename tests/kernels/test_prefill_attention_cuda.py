"""Attention of prompts over the paged cache against plain torch in float32."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gptq_api.kernels import gemm
from gptq_api.kernels.prefill_attention import TILE_ROWS, prefill_attention, unavailable_reason

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available"),
    pytest.mark.skipif(unavailable_reason() is not None, reason=unavailable_reason() or "available"),
]
ERROR = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
MIXED = ((1, 1), (5, 5), (130, 130), (1, 300), (128, 128), (70, 200), (257, 400))
"""(new rows, context) of the sequences of a batch: whole prompts, chunks behind a prefix, decoding ones"""


@dataclass
class Step:
    """A packed batch whose history is in a cache of shuffled blocks; slots nobody wrote hold NaN."""

    sizes: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float16
    cache_dtype: torch.dtype | None = None
    block_size: int = 16
    device: str = "cuda"

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(1)
        cache_dtype = self.cache_dtype or self.dtype
        rows = sum(new for new, _ in self.sizes)
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = torch.randn(rows, width, generator=generator, device=self.device).to(self.dtype)
        self.qkv[:, self.heads * self.head_dim :] = torch.nan  # keys and values come from the cache
        self.per_sequence = max(-(-context // self.block_size) for _, context in self.sizes)
        blocks = self.per_sequence * len(self.sizes) + 2
        order = torch.randperm(blocks, generator=generator, device=self.device)
        shape = (blocks, 2, self.kv_heads, self.block_size, self.head_dim)
        cache = torch.full(shape, torch.nan, device=self.device)
        self.block_tables = torch.full((len(self.sizes), self.per_sequence + 3), -1, device=self.device).int()
        self.keys, self.values = [], []
        for s, (_, context) in enumerate(self.sizes):
            used = -(-context // self.block_size)
            mine = order[s * self.per_sequence :][:used]
            self.block_tables[s, :used] = mine.int()
            both = torch.randn(context, 2, self.kv_heads, self.head_dim, generator=generator, device=self.device)
            both = both.to(cache_dtype).float()
            self.keys.append(both[:, 0])
            self.values.append(both[:, 1])
            slots = torch.arange(context, device=self.device)
            cache[mine[slots // self.block_size], :, :, slots % self.block_size] = both
        self.kv_layer = cache.to(cache_dtype)
        self.context_lens = torch.tensor([context for _, context in self.sizes], device=self.device).int()
        starts = [0]
        for new, _ in self.sizes:
            starts.append(starts[-1] + new)
        self.starts = starts
        self.query_start = torch.tensor(starts, device=self.device).int()
        tiles = [(s, row) for s, (new, _) in enumerate(self.sizes) if new > 1 for row in range(0, new, TILE_ROWS)]
        self.tiles = torch.tensor(tiles, device=self.device).int().view(-1, 2)
        self.add_idle_tiles(3)
        self.served = torch.cat([torch.full((new,), new > 1, device=self.device) for new, _ in self.sizes])

    def add_idle_tiles(self, count: int) -> None:
        self.tiles = torch.nn.functional.pad(self.tiles, (0, 0, 0, count), value=-1)

    def run(self, window: int | None = None) -> Tensor:
        out = torch.full((self.qkv.shape[0], self.heads * self.head_dim), torch.nan, device=self.device).to(self.dtype)
        where = (self.block_tables, self.context_lens, self.query_start, self.tiles)
        scale = 1 / math.sqrt(self.head_dim)
        stored = self.kv_layer.view(torch.uint8) if self.kv_layer.dtype == torch.float8_e4m3fn else self.kv_layer
        assert prefill_attention(self.qkv, stored, *where, out, self.heads, scale, window) is out
        return out

    def expected(self, window: int | None = None) -> Tensor:
        out = torch.empty(self.qkv.shape[0], self.heads, self.head_dim, device=self.device)
        q = self.qkv[:, : self.heads * self.head_dim].float().view(-1, self.heads, self.head_dim)
        for s, (new, context) in enumerate(self.sizes):
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (self.keys[s], self.values[s]))
            scores = torch.einsum("rhd,nhd->hrn", q[self.starts[s] : self.starts[s + 1]], k) / math.sqrt(self.head_dim)
            position = torch.arange(context - new, context, device=self.device).unsqueeze(1)
            n = torch.arange(context, device=self.device)
            seen = (n <= position) & (n > position - (window or context))
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
            out[self.starts[s] : self.starts[s + 1]] = torch.einsum("hrn,nhd->rhd", weights, v)
        return out.flatten(1)

    def check(self, window: int | None = None) -> None:
        found, expected = self.run(window), self.expected(window)
        assert bool(found[~self.served].isnan().all()), "a row of another kernel was written"
        found, expected = found[self.served].float(), expected[self.served]
        assert bool(found.isfinite().all())
        error = (found - expected).norm(dim=1) / expected.norm(dim=1)
        assert float(error.max()) < ERROR[self.dtype]


@pytest.mark.parametrize(
    ("head_dim", "dtype", "cache_dtype"),
    [
        *((head_dim, torch.float16, None) for head_dim in (64, 80, 96, 128, 256)),
        *((head_dim, torch.bfloat16, None) for head_dim in (64, 128)),
        *((128, dtype, torch.float8_e4m3fn) for dtype in (torch.float16, torch.bfloat16)),
        (64, torch.bfloat16, torch.float8_e4m3fn),
    ],
)
@pytest.mark.parametrize("window", [None, 100])
def test_mixed_batches(window: int | None, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    step = Step(MIXED, 8, 2, head_dim, dtype, cache_dtype)
    step.check(window)
    few = step.run(window)
    step.add_idle_tiles(100)  # enough tiles for programs of whole ones
    step.check(window)
    assert torch.equal(step.run(window)[step.served], few[step.served])


@pytest.mark.parametrize("block_size", [8, 32, 64, 128, 256])
def test_block_sizes(block_size: int) -> None:
    Step(MIXED, 4, 2, 128, block_size=block_size).check()


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 63, 64, 65, 128, 129, 1000, 5000])
def test_windows_of_every_alignment(window: int) -> None:
    Step(((1024, 1024), (200, 1100), (128, 703)), 2, 1, 128).check(window)


def test_a_long_prompt() -> None:
    Step(((2048, 2048), (2000, 3000)), 20, 4, 128).check()


def test_large_scores_do_not_overflow() -> None:
    step = Step(((300, 300),), 2, 2, 128)
    step.qkv[:, : 2 * 128] *= 100
    found, expected = step.run().float(), step.expected()
    assert float((found - expected).norm() / expected.norm()) < 2e-3


def test_rows_depend_neither_on_company_nor_on_chunks() -> None:
    step = Step(((300, 300), (517, 517), (40, 900)), 4, 2, 128)
    together = step.run()
    first = step.starts[1]
    for bounds in ([0, 517], [0, 200, 517], [0, 16, 17 + 128, 500, 517]):
        for low, high in itertools.pairwise(bounds):
            where = (
                step.block_tables[1:2],
                torch.tensor([high]).int().cuda(),
                torch.tensor([0, high - low]).int().cuda(),
            )
            tiles = torch.tensor([(0, row) for row in range(0, high - low, TILE_ROWS)]).int().cuda()
            rows = slice(first + low, first + high)
            out = torch.empty_like(together[rows])
            prefill_attention(step.qkv[rows], step.kv_layer, *where, tiles, out, 4, 1 / math.sqrt(128))
            assert torch.equal(out, together[rows]), (low, high)


def test_a_captured_step_replays_with_other_sequences() -> None:
    """Grid and tensors are fixed; what is attended is read on the device."""
    step = Step(((128, 128), (256, 300)), 4, 4, 128)
    step.run()
    out = torch.zeros(step.qkv.shape[0], 4 * 128, dtype=torch.float16, device="cuda")
    where = (step.block_tables, step.context_lens, step.query_start, step.tiles)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prefill_attention(step.qkv, step.kv_layer, *where, out, 4, 1 / math.sqrt(128))
    graph.replay()
    assert torch.equal(out, step.run())
    out.zero_()
    step.tiles[0, 0] = -1
    graph.replay()
    assert not bool(out[:128].any()) and bool(out[128:].any())


def test_what_does_not_fit_is_refused() -> None:
    step = Step(((4, 4),), 2, 2, 64)
    where = (step.block_tables, step.context_lens, step.query_start, step.tiles)
    out = torch.empty(4, 128, dtype=torch.float16, device="cuda")
    with pytest.raises(ValueError, match="head dimension 48"):
        prefill_attention(step.qkv, step.kv_layer[..., :48], *where, out, 2, 1.0)
    with pytest.raises(ValueError, match="blocks of 4 tokens"):
        prefill_attention(step.qkv, step.kv_layer[..., :4, :], *where, out, 2, 1.0)
    with pytest.raises(ValueError, match="window 0"):
        prefill_attention(step.qkv, step.kv_layer, *where, out, 2, 1.0, window=0)
    with pytest.raises(ValueError, match=r"contiguous torch\.float16 or e4m3"):
        prefill_attention(step.qkv, step.kv_layer.bfloat16(), *where, out, 2, 1.0)
