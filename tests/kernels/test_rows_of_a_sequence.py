"""Rows of one sequence that share a reading of its cache in decode attention, on a CUDA device: each has the bits that
it has alone, whatever the others hold, and the cache gets the same keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gptq_api.kernels import gemm
from gptq_api.kernels.decode_attention import RotaryInputs, decode_attention, decode_attention_workspace
from gptq_api.kernels.row_groups import RowGroups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available"),
]
DEVICE = "cuda"
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
CACHES = pytest.mark.parametrize("fp8", [False, True], ids=["16-bit", "e4m3"])
HEADS = [(3, 3), (4, 2), (8, 2), (6, 2), (7, 1), (8, 1), (12, 1), (40, 40)]
STEPS = [
    [(120, 8)],
    [(30, 3), (127, 2), (0, 3)],
    [(128, 7), (500, 1)],
    [(24, 8)],
    [(95, 2), (254, 5)],
    [(0, 8)],
]
"""(tokens in the cache before the step, its rows) of each sequence, at the borders of tiles, steps and blocks"""


def ints(values: list[int] | list[tuple[int, int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@dataclass
class Drafted:
    """A step. Whatever is not in the cache before it is NaN there."""

    sequences: list[tuple[int, int]]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    fp8: bool = False
    block_size: int = 16
    window: int | None = None
    normed: bool = False

    def __post_init__(self) -> None:
        g = torch.Generator(DEVICE).manual_seed(0)
        heads, dim, size = self.num_kv_heads, self.head_dim, self.block_size

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=DEVICE)

        kind = torch.float8_e4m3fn if self.fp8 else self.dtype
        counts = [-(-(base + rows) // size) for base, rows in self.sequences]
        order = torch.randperm(sum(counts) + 2, generator=g, device=DEVICE).tolist()
        cache = torch.full((len(order), 2, heads, size, dim), torch.nan, device=DEVICE)
        tables, self.positions_list, self.slots_list, ranks = list[list[int]](), list[int](), list[int](), list[int]()
        for (base, rows), count in zip(self.sequences, counts, strict=True):
            blocks = [order.pop() for _ in range(count)]
            held = normal(count * size, 2, heads, dim)
            held[base:] = torch.nan
            cache[blocks] = held.view(count, size, 2, heads, dim).permute(0, 2, 3, 1, 4)
            tables += [blocks + [-1] * (max(counts) + 2 - count)] * rows
            places = list(range(base, base + rows))
            self.positions_list += places
            self.slots_list += [blocks[place // size] * size + place % size for place in places]
            ranks += range(rows)
        self.cache, self.tables = cache.to(kind), torch.tensor(tables, dtype=torch.int32, device=DEVICE)
        self.num_rows, contexts = len(ranks), [place + 1 for place in self.positions_list]
        self.qkv = normal(self.num_rows, (self.num_heads + 2 * heads) * dim).to(self.dtype)
        self.positions, self.slots, self.lens = ints(self.positions_list), ints(self.slots_list), ints(contexts)
        self.groups = ints(RowGroups.for_heads(self.num_heads, heads, [self.window]).of(contexts, ranks))
        self.starts = ints(list(range(self.num_rows + 1)))
        self.cos_sin = torch.rand(max(contexts) + 1, dim, generator=g, device=DEVICE)
        norms = (torch.rand(2, dim, generator=g, device=DEVICE) + 0.5).to(self.dtype)
        self.norms: tuple[Tensor | None, Tensor | None] = (norms[0], norms[1]) if self.normed else (None, None)
        self.workspace = decode_attention_workspace(self.num_heads, heads, dim, DEVICE)

    def values_of(self, row: int) -> Tensor:
        """The row's, in qkv."""
        return self.qkv[row, -self.num_kv_heads * self.head_dim :]

    def run(
        self, cache: Tensor, rows: slice, groups: Tensor | None, rotary: bool = True, out_index: Tensor | None = None
    ) -> Tensor:
        qkv, lens = self.qkv[rows], self.lens[rows]
        out = torch.full((len(lens), self.num_heads * self.head_dim), torch.nan, dtype=self.dtype, device=DEVICE)
        turns = RotaryInputs(self.positions[rows], self.slots[rows], self.cos_sin, *self.norms, 1e-5)
        decode_attention(
            *(qkv.clone(), cache, self.tables[rows], lens, self.starts[: len(lens) + 1], out, self.num_heads),
            *(self.head_dim**-0.5, self.workspace, self.window, turns if rotary else None, out_index),
            groups=groups,
            prefetch=rotary,
        )
        return out

    def alone(self) -> tuple[Tensor, Tensor]:
        """(results, the cache's bytes afterwards), one row after another."""
        cache = self.cache.clone()
        rows = [self.run(cache, slice(row, row + 1), None) for row in range(self.num_rows)]
        return torch.cat(rows), cache.view(torch.uint8)

    def together(self) -> tuple[Tensor, Tensor]:
        cache = self.cache.clone()
        return self.run(cache, slice(None), self.groups), cache.view(torch.uint8)

    def check(self) -> None:
        out, cache = self.together()
        expected, expected_cache = self.alone()
        assert not expected.isnan().any()
        wrong = (out != expected).any(1).nonzero()[:, 0].tolist()
        assert not wrong, (self, wrong, self.groups.tolist())
        assert torch.equal(cache, expected_cache), (self, "cache")
        assert bool((self.workspace == 255).all()), (self, "workspace")


@DTYPES
@CACHES
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
def test_rows_have_the_bits_that_they_have_alone(
    num_heads: int, num_kv_heads: int, head_dim: int, fp8: bool, dtype: torch.dtype
) -> None:
    shape = (num_heads, num_kv_heads, head_dim, dtype, fp8)
    for i, sequences in enumerate(STEPS):
        for window in (None, 1, 3, 30, 100, 128):
            Drafted(sequences, *shape, (8, 16, 32)[i % 3], window, normed=i % 2 == 1).check()


@CACHES
@pytest.mark.parametrize("window", [None, 4096, 4000])
@pytest.mark.parametrize("base", [4088, 4090, 4095, 4096, 5113, 8187, 33000])
def test_where_chunks_are_cut_otherwise(base: int, window: int | None, fp8: bool) -> None:
    for heads in ((4, 4), (4, 2), (8, 2)):
        Drafted([(base, 8)], *heads, 128, torch.float16, fp8, 16, window).check()
        Drafted([(base, 5), (60, 3)], *heads, 64, torch.bfloat16, fp8, 32, window).check()


@CACHES
@pytest.mark.parametrize("window", [None, 4000])
@pytest.mark.parametrize("base", [4105, 4115, 4125, 4195, 8000, 8126, 8210, 8224])
def test_chunks_of_several_steps(base: int, window: int | None, fp8: bool) -> None:
    """A chunk's sum is multiplied and added to, which a compiler may make one operation in one kernel and two in
    another: one in 500,000 results was rounded otherwise in these."""
    Drafted([(base, 8)], 8, 8, 128, torch.float16, fp8, window=window).check()


@pytest.mark.parametrize("num_heads", [40, 128], ids=["a block of an SM", "two blocks"])
def test_a_call_gives_the_same_bits_every_time(num_heads: int) -> None:
    for base in (90, 124, 2048):
        case = Drafted([(base, 8)], num_heads, num_heads, 128, torch.float16)
        expected, expected_cache = case.alone()
        for _ in range(100):
            out, cache = case.together()
            assert torch.equal(out, expected) and torch.equal(cache, expected_cache)


@DTYPES
@CACHES
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("what", ["all", "infinite values"])
def test_what_is_not_finite_in_a_row_stays_there(
    what: str, window: int | None, head_dim: int, fp8: bool, dtype: torch.dtype
) -> None:
    """Rows that do not see it have their bits; those that see it have no numbers, as they have not alone."""
    if what == "infinite values" and fp8:
        pytest.skip("they saturate")
    old_e4m3 = fp8 and torch.cuda.get_device_capability() < (8, 9)
    for base in (120, 126, 60, 0):
        for sick in range(6):
            case = Drafted([(base, 6), (40, 2)], 6, 3, head_dim, dtype, fp8, window=window)
            if what == "all":
                case.qkv[sick] = torch.nan
            else:
                case.values_of(sick)[1::7] = torch.inf
            expected, expected_cache = case.alone()
            out, cache = case.together()
            finite = expected.isfinite().all(1)
            assert torch.equal(out.isfinite().all(1), finite)
            assert torch.equal(out[finite], expected[finite]), (base, sick)
            assert torch.equal(cache, expected_cache)
            if not old_e4m3:
                assert finite.tolist()[:sick] == [True] * sick and not finite[sick] and bool(finite[6:].all())


@DTYPES
@CACHES
def test_a_weight_of_zero_takes_nothing_from_a_sum_however_large_the_value(fp8: bool, dtype: torch.dtype) -> None:
    """Rows whose own values are a hundred thousandth of those of the rows behind them."""
    for head_dim in (64, 128):
        for base in (100, 126, 5):
            case = Drafted([(base, 8)], 4, 4, head_dim, dtype, fp8)
            smaller = torch.tensor([1.0, 0.01], device=DEVICE).view(1, 2, 1, 1, 1)
            case.cache = (case.cache.float() * smaller).to(case.cache.dtype)
            for row in range(8):
                case.values_of(row).mul_(0.01 if row < 3 else 400.0 if fp8 else 12000.0)
            case.check()


@CACHES
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(5, 5), (8, 4), (8, 2), (7, 1)])
def test_rows_whose_keys_and_values_are_in_the_cache(num_heads: int, num_kv_heads: int, fp8: bool) -> None:
    """Any number of them."""
    for window in (None, 5, 100):
        sequences = [(100, 60), (3, 1), (0, 20), (4090, 13)]
        case = Drafted(sequences, num_heads, num_kv_heads, 128, torch.bfloat16, fp8, 16, window)
        keys_and_values = torch.randn(case.cache.shape, device=DEVICE).to(case.cache.dtype)
        missing = case.cache.float().isnan()
        case.cache = torch.where(missing, keys_and_values.float(), case.cache.float()).to(case.cache.dtype)
        out = case.run(case.cache, slice(None), case.groups, rotary=False)
        expected = case.run(case.cache, slice(None), None, rotary=False)
        assert not expected.isnan().any() and torch.equal(out, expected)


def test_padding_and_the_order_of_the_next_product() -> None:
    case = Drafted([(77, 3)], 4, 4, 128, torch.float16)
    expected, expected_cache = case.alone()
    order = torch.randperm(4 * 128, device=DEVICE)
    rows = torch.tensor([0, 1, 2, 0, 0, 0, 0, 0], device=DEVICE)
    case.qkv, case.tables = case.qkv[rows], case.tables[rows]
    case.positions, case.slots = ints([*case.positions_list, *[-1] * 5]), ints([*case.slots_list, *[-1] * 5])
    case.lens, case.starts = ints([78, 79, 80, *[0] * 5]), ints([0, 1, 2, 3, *[3] * 5])
    case.groups = ints([(3, 3), *[(0, 0)] * 7])
    cache = case.cache.clone()
    out = case.run(cache, slice(None), case.groups, out_index=torch.argsort(order).to(torch.int32))
    assert torch.equal(out[:3], expected[:, order]) and out[3:].isnan().all()
    assert torch.equal(cache.view(torch.uint8), expected_cache)


def test_a_captured_graph_follows_groups_and_lengths() -> None:
    first = Drafted([(250, 8)], 4, 4, 128, torch.float16)
    cache, out = first.cache.clone(), torch.empty(8, 4 * 128, dtype=torch.float16, device=DEVICE)
    turns = RotaryInputs(first.positions, first.slots, first.cos_sin)
    arguments = (first.qkv, cache, first.tables, first.lens, first.starts, out, 4, 128**-0.5, first.workspace)

    def attend() -> None:
        decode_attention(*arguments, None, turns, groups=first.groups, prefetch=True)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    for rows in (8, 3, 1):
        # The step of the second case, in which the rows behind the first few are other sequences of one token each.
        lens = [121 + i for i in range(rows)] + [1] * (8 - rows)
        other = Drafted([(120, rows), *[(0, 1)] * (8 - rows)], 4, 4, 128, torch.float16)
        assert other.lens.tolist() == lens and cache.shape[0] >= other.cache.shape[0]
        cache[: other.cache.shape[0]] = other.cache
        first.tables.fill_(-1)
        first.tables[:, : other.tables.shape[1]] = other.tables
        for to, array in (
            (first.qkv, other.qkv),
            (first.lens, other.lens),
            (first.groups, other.groups),
            (first.positions, other.positions),
            (first.slots, other.slots),
        ):
            to.copy_(array)
        first.cos_sin[: len(other.cos_sin)] = other.cos_sin
        graph.replay()
        expected, expected_cache = other.alone()
        assert torch.equal(out, expected)
        assert torch.equal(cache[: other.cache.shape[0]].view(torch.uint8), expected_cache)


def test_refusals() -> None:
    case = Drafted([(20, 9)], 2, 2, 64, torch.float16)
    with pytest.raises(ValueError, match="groups of 9 rows to rotate and write; decode_attention takes 8"):
        case.together()
    with pytest.raises(ValueError, match="groups"):
        case.run(case.cache, slice(None), case.groups[:-1], rotary=False)
    out = torch.empty(9, 128, dtype=torch.float16, device=DEVICE)
    where = (case.qkv, case.cache, case.tables, case.lens, case.starts, out, 2, 0.1, case.workspace)
    with pytest.raises(ValueError, match="groups with warps that attend alone"):
        decode_attention(*where, groups=case.groups, teams="warps")
