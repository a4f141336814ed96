"""Paged decode attention on a CUDA device against float32 attention over the gathered context: every group size, type
of cache, block size and length at the borders of tiles, steps and chunks; and the same bits in any batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gptq_api.kernels import gemm
from gptq_api.kernels.decode_attention import RotaryInputs, decode_attention, decode_attention_workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
CACHES = pytest.mark.parametrize("fp8", [False, True], ids=["16-bit", "e4m3"])
ERROR = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""relative; rounding the result alone costs 2e-4 and 1.7e-3, rounding the weights of the values as much again"""
LENGTHS = [1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 256, 257, 640, 1000, 3, 64, 97]


@dataclass
class Case:
    """A batch with its cache. Whatever no sequence owns is NaN: unused blocks, and slots behind the last token."""

    lengths: list[int]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    fp8: bool = False
    block_size: int = 16
    window: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator("cuda").manual_seed(self.seed)
        heads, dim, size = self.num_kv_heads, self.head_dim, self.block_size
        longest = max(self.lengths)
        counts = [-(-n // size) for n in self.lengths]
        order = torch.randperm(sum(counts) + 3, generator=g, device="cuda").tolist()
        self.tables = torch.full((len(counts), -(-longest // size) + 2), -1, dtype=torch.int32, device="cuda")
        rows = len(counts)
        self.kv_type = torch.float8_e4m3fn if self.fp8 else self.dtype
        cache = torch.full((len(order), 2, heads, size, dim), torch.nan, device="cuda")
        self.context: list[Tensor] = []
        """[2, heads, tokens, dim] float32, as the cache holds them"""
        used = 0
        for s, (n, count) in enumerate(zip(self.lengths, counts, strict=True)):
            blocks = order[used : used + count]
            used += count
            self.tables[s, :count] = torch.tensor(blocks, dtype=torch.int32)
            values = torch.randn(2, heads, n, dim, generator=g, device="cuda").to(self.kv_type).float()
            padded = functional.pad(values, (0, 0, 0, count * size - n), value=torch.nan)
            cache[blocks] = padded.view(2, heads, count, size, dim).permute(2, 0, 1, 3, 4)
            self.context.append(values)
        self.cache = cache.to(self.kv_type)
        self.lens = torch.tensor(self.lengths, dtype=torch.int32, device="cuda")
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
        width = (self.num_heads + 2 * heads) * dim
        self.qkv = torch.randn(rows, width, generator=g, device="cuda").to(self.dtype)
        self.workspace = decode_attention_workspace(self.num_heads, heads, dim, "cuda")
        self.scale = dim**-0.5

    def slots(self) -> Tensor:
        last = self.lens.long() - 1
        blocks = self.tables.gather(1, (last // self.block_size).unsqueeze(1))[:, 0]
        return (blocks * self.block_size + last % self.block_size).to(torch.int32)

    def run(
        self,
        rotary: RotaryInputs | None = None,
        prefetch: bool = False,
        teams: str = "best",
        out_index: Tensor | None = None,
    ) -> Tensor:
        rows = self.qkv.shape[0]
        out = torch.full((rows, self.num_heads * self.head_dim), torch.nan, dtype=self.dtype, device="cuda")
        return decode_attention(
            *(self.qkv, self.cache, self.tables, self.lens, self.starts, out, self.num_heads, self.scale),
            *(self.workspace, self.window, rotary, out_index),
            prefetch=prefetch,
            teams=teams,
        )

    def expected(self, queries: Tensor) -> Tensor:
        """queries [rows, num_heads * head_dim] -> the same, float32."""
        rows = []
        for s, context in enumerate(self.context):
            keys, values = context if self.window is None else context[:, :, -self.window :]
            q = queries[s].float().view(self.num_heads, 1, self.head_dim)
            share = self.num_heads // self.num_kv_heads
            scores = q @ keys.repeat_interleave(share, 0).transpose(1, 2) * self.scale
            rows.append((scores.softmax(-1) @ values.repeat_interleave(share, 0)).reshape(-1))
        return torch.stack(rows)

    def queries(self) -> Tensor:
        return self.qkv[:, : self.num_heads * self.head_dim]


def error(out: Tensor, expected: Tensor) -> float:
    """The worst row's."""
    difference = (out.float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert not difference.isnan().any()
    return float(difference.max())


@pytest.fixture(autouse=True)
def exact_reference() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@DTYPES
@CACHES
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"), [(3, 3), (4, 2), (8, 2), (10, 2), (6, 1), (14, 2), (8, 1), (11, 1), (32, 2)]
)
def test_every_group_and_length(
    num_heads: int, num_kv_heads: int, head_dim: int, fp8: bool, dtype: torch.dtype
) -> None:
    case = Case(LENGTHS, num_heads, num_kv_heads, head_dim, dtype, fp8)
    assert error(case.run(), case.expected(case.queries())) < ERROR[dtype]


@CACHES
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("window", [None, 1, 16, 100, 128, 400])
def test_blocks_and_windows(window: int | None, block_size: int, fp8: bool) -> None:
    case = Case(LENGTHS, 8, 2, 128, torch.bfloat16, fp8, block_size, window)
    if window is not None:  # what no window reaches has been given away
        for s, n in enumerate(case.lengths):
            case.tables[s, : max(0, n - window) // block_size] = -1
    assert error(case.run(), case.expected(case.queries())) < ERROR[torch.bfloat16]


@CACHES
@pytest.mark.parametrize("lengths", [[4096], [4097, 5], [9000, 4100, 1], [33000]])
def test_long_contexts(lengths: list[int], fp8: bool) -> None:
    case = Case(lengths, 8, 2, 128, torch.float16, fp8)
    assert error(case.run(), case.expected(case.queries())) < ERROR[torch.float16]


def rotated(x: Tensor, cos_sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """float32 [rows, heads, D] normalised and rotated."""
    if weight is not None:
        x = functional.rms_norm(x, x.shape[-1:], weight.float(), eps)
    half = x.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


@DTYPES
@CACHES
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (10, 2), (11, 1)])
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize("prefetch", [False, True])
def test_rotary_and_the_new_row(
    prefetch: bool, normed: bool, num_heads: int, num_kv_heads: int, head_dim: int, fp8: bool, dtype: torch.dtype
) -> None:
    case = Case(LENGTHS, num_heads, num_kv_heads, head_dim, dtype, fp8)
    rows, width = len(LENGTHS), num_heads * head_dim
    angles = torch.rand(2000, head_dim // 2, device="cuda") * 6.28
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
    q_norm, k_norm = (torch.rand(head_dim, device="cuda").to(dtype) + 0.5 for _ in range(2))
    positions, slots = case.lens - 1, case.slots()
    slots[3] = -1  # attended to, but not kept
    eps = 1e-6 if normed else 0.0
    norms = (q_norm, k_norm) if normed else (None, None)
    rotary = RotaryInputs(positions, slots, cos_sin, norms[0], norms[1], eps)
    turns = cos_sin[positions.long()]
    per_head = case.qkv.float().view(rows, -1, head_dim)
    q = rotated(per_head[:, :num_heads], turns, norms[0], eps).to(dtype)
    k = rotated(per_head[:, num_heads : num_heads + num_kv_heads], turns, norms[1], eps).to(case.kv_type)
    v = per_head[:, num_heads + num_kv_heads :].to(case.kv_type)
    # The new row is not in the cache yet: NaN stands there.
    planes = case.cache.view(torch.uint8 if fp8 else torch.int16)
    old = case.cache.clone()
    for s, slot in enumerate(case.slots().tolist()):
        case.cache[slot // 16, :, :, slot % 16] = torch.full((), torch.nan).to(case.kv_type)
        case.context[s][0, :, -1], case.context[s][1, :, -1] = k[s].float(), v[s].float()
        old[slot // 16, :, :, slot % 16] = torch.stack([k[s], v[s]])
    untouched = int(case.slots()[3])
    old[untouched // 16, :, :, untouched % 16] = torch.full((), torch.nan).to(case.kv_type)
    out = case.run(rotary, prefetch=prefetch)
    assert error(out, case.expected(q.view(rows, width))) < ERROR[dtype]
    # Everything else in the cache is as it was; the new rows may differ by a rounding where the norm's sum does.
    same = (planes == old.view(planes.dtype)) | (case.cache.float().isnan() & old.float().isnan())
    if normed:
        assert same.float().mean() > 0.999
        close = torch.isclose(case.cache.float(), old.float(), rtol=0.15 if fp8 else 0.02, atol=0.01, equal_nan=True)
        assert close.all()
    else:
        assert same.float().mean() > 0.9995, "products and sums may be contracted differently"
        assert torch.equal(case.cache.float().isnan(), old.float().isnan())


def test_bits_depend_neither_on_the_batch_nor_on_the_run() -> None:
    lengths = [700, 1, 129, 2048, 333, 5000, 64, 128]
    case = Case(lengths, 10, 2, 128, torch.bfloat16)
    together = case.run()
    for _ in range(5):
        assert torch.equal(case.run(), together)
    for s in range(len(lengths)):
        alone = replace(case)
        alone.tables, alone.lens, alone.starts = case.tables[s : s + 1], case.lens[s : s + 1], case.starts[:2]
        alone.qkv, alone.cache, alone.workspace = case.qkv[s : s + 1], case.cache, case.workspace
        assert torch.equal(alone.run()[0], together[s]), lengths[s]
    many = replace(case)
    pick = torch.arange(200, device="cuda") % len(lengths)
    many.tables, many.lens, many.qkv, many.cache = case.tables[pick], case.lens[pick], case.qkv[pick], case.cache
    many.starts = torch.arange(201, dtype=torch.int32, device="cuda")
    many.workspace = decode_attention_workspace(10, 2, 128, "cuda")
    assert torch.equal(many.run(), together[pick])


@DTYPES
@CACHES
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "window", "block_size"),
    [(40, 40, None, 16), (12, 4, 100, 8), (16, 2, None, 64), (22, 2, 300, 16)],
)
@pytest.mark.parametrize("rotates", [False, True], ids=["rotated", "rotates"])
def test_a_warp_alone_finds_the_same_bits(
    rotates: bool,
    num_heads: int,
    num_kv_heads: int,
    window: int | None,
    block_size: int,
    head_dim: int,
    fp8: bool,
    dtype: torch.dtype,
) -> None:
    """Many sequences, so that all warps have several items, and few, so that an item is many warps'."""
    for lengths in (LENGTHS * 8, [3900, 2, 1500]):
        case = Case(lengths, num_heads, num_kv_heads, head_dim, dtype, fp8, block_size, window)
        rotary, prefetch = None, False
        if rotates:
            table = torch.rand(4096, head_dim, device="cuda")
            norms = (torch.rand(2, head_dim, device="cuda") + 0.5).to(dtype)
            rotary, prefetch = RotaryInputs(case.lens - 1, case.slots(), table, norms[0], norms[1], 1e-5), True
        empty = case.cache.clone()
        found, caches = [], []
        for teams in ("blocks", "warps", "warps"):
            case.cache.copy_(empty)
            found.append(case.run(rotary, prefetch, teams))
            caches.append(case.cache.view(torch.uint8).clone())
        assert not found[0].isnan().any()
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        assert torch.equal(caches[0], caches[1])


@CACHES
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (10, 2), (11, 1), (40, 40)])
def test_results_in_the_order_of_the_next_product(num_heads: int, num_kv_heads: int, head_dim: int, fp8: bool) -> None:
    for lengths in ([130], LENGTHS, LENGTHS * 20):  # also where warps would attend alone
        case = Case(lengths, num_heads, num_kv_heads, head_dim, torch.float16, fp8)
        order = torch.randperm(num_heads * head_dim, device="cuda")
        sorted_ = case.run(out_index=torch.argsort(order).to(torch.int32))
        assert torch.equal(sorted_, case.run()[:, order])


def test_rows_of_others_and_padding() -> None:
    """A mixed step: sequences 1 and 3 bring several rows; a padding row becomes zeros."""
    case = Case([40, 50, 300, 7, 20], 8, 2, 128, torch.float16)
    new = torch.tensor([1, 10, 1, 3, 1])
    case.starts = functional.pad(new.cumsum(0), (1, 0)).to(device="cuda", dtype=torch.int32)
    single = case.starts[[0, 2, 4]].long()
    expected = case.expected(case.queries())[[0, 2, 4]]
    expected[2] = 0
    case.lens[4] = 0
    qkv = torch.full((16, case.qkv.shape[1]), torch.nan, dtype=case.dtype, device="cuda")
    qkv[single] = case.qkv[[0, 2, 4]]
    case.qkv = qkv
    out = case.run()
    rows = out[single]
    assert error(rows[:2], expected[:2]) < ERROR[torch.float16]
    assert not rows[2].any() and not rows[2].isnan().any()
    others = torch.ones(16, dtype=torch.bool, device="cuda")
    others[single] = False
    assert out[others].isnan().all()


def test_a_captured_graph_follows_the_lengths() -> None:
    case = Case([600, 300, 1, 77], 8, 8, 64, torch.float16)
    full = case.lens.clone()
    out = torch.empty(4, 8 * 64, dtype=case.dtype, device="cuda")
    args = (case.qkv, case.cache, case.tables, case.lens, case.starts, out, 8, case.scale, case.workspace)
    decode_attention(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_attention(*args)
    contexts = case.context
    for lengths in ([1, 1, 1, 1], [600, 300, 1, 77], [130, 299, 1, 33]):
        case.lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        case.context = [context[:, :, :n] for context, n in zip(contexts, lengths, strict=True)]
        graph.replay()
        assert error(out, case.expected(case.queries())) < ERROR[torch.float16]
    assert torch.equal(full.cpu(), torch.tensor([600, 300, 1, 77], dtype=torch.int32))


def test_what_an_e4m3_cache_costs() -> None:
    """Against the unrounded context: 3 bits of mantissa, averaged over the tokens."""
    exact = Case([512] * 4, 8, 8, 128, torch.bfloat16)
    small = Case([512] * 4, 8, 8, 128, torch.bfloat16, fp8=True)
    for s in range(4):  # the same numbers before rounding: both cases draw from the same seed
        assert error(small.context[s].flatten(1), exact.context[s].flatten(1)) < 0.04
    assert error(small.run(), exact.expected(exact.queries())) < 0.06


def test_refusals() -> None:
    with pytest.raises(ValueError, match="'threads'; one of best, blocks, warps"):
        Case([5], 8, 2, 128, torch.float16).run(teams="threads")
    with pytest.raises(ValueError, match="up to 4096"):
        Case([5000], 8, 2, 128, torch.float16).run(teams="warps")
    case = Case([5], 4, 2, 64, torch.float16)
    index = torch.arange(256, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="warps that attend alone"):
        case.run(teams="warps", out_index=index)
    with pytest.raises(ValueError, match="out_index"):
        case.run(out_index=index[:-1])
    with pytest.raises(ValueError, match="head dimension 80"):
        decode_attention_workspace(4, 2, 80, "cuda")
    with pytest.raises(ValueError, match="prefetch without rotary"):
        case.run(prefetch=True)
    with pytest.raises(ValueError, match="workspace"):
        case.workspace = case.workspace[:64]
        case.run()
