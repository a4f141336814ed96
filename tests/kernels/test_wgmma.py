"""The wgmma kernels against float64 on a Hopper GPU; what the compiler makes of them: tests/ext/test_budgets.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from torch import Tensor

from gptq_api.kernels import extension, gemm
from gptq_api.kernels.layout import PackedLinear
from gptq_api.kernels.workspace import has_wgmma, workspace

TILES = {
    "128x16": 1, "128x32": 2, "128x64": 3, "192x64": 4, "192x96": 5,
    "128x128": 6, "192x128": 7, "128x192": 8, "128x256": 9,
}  # fmt: skip
SCALED = (7, 8, 9)
"""whose operand is weight times scale rounded to 16 bits; used for large weights and many tokens only"""
ONE, TWO = 1, 2
ALONG_K, WHOLE = 1, 2
BOUND = {torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        gemm.unavailable_reason() is not None or not has_wgmma(torch.cuda.current_device()),
        reason=gemm.unavailable_reason() or "needs compute capability 9.0, and kernels compiled for it",
    ),
]


def weight(
    k: int, n: int, group_size: int, *, asym: bool = False, order: bool = False, paired: bool = False
) -> tuple[PackedLinear, Tensor]:
    """A packed weight and the float64 [K, N] matrix it stands for."""
    g = torch.Generator(device="cuda").manual_seed(k + n + group_size)
    groups = 1 if group_size == -1 else -(-k // group_size)
    values = torch.randint(0, 16, (k, n), device="cuda", generator=g)
    scales = (torch.rand(groups, n, device="cuda", generator=g) * 0.02 + 0.001).half()
    zeros = torch.randint(0, 17, (groups, n), device="cuda", generator=g).to(torch.uint8) if asym else None
    g_idx = torch.arange(k, device="cuda") // (k if group_size == -1 else group_size)
    if order:
        g_idx = g_idx[torch.randperm(k, device="cuda", generator=g)]
    packed = torch.zeros(k // 8, n, dtype=torch.int64, device="cuda")
    for i in range(8):
        packed |= values[i::8] << (4 * i)
    qweight = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    offset = 8 if zeros is None else zeros.double()[g_idx]
    dense = (values.double() - offset) * scales.double()[g_idx]
    return gemm.pack(qweight, scales, zeros, g_idx.int() if order else None, group_size, "cuda", paired=paired), dense


def wgmma(x: Tensor, w: PackedLinear, y: Tensor, tile: int, sharing: int = ONE, split: int = 0) -> None:
    """One tile of the table, whatever M is."""
    stream = gemm._stream(x)
    extension.cuda.wgmma(
        w.data.data_ptr(), x.data_ptr(), y.data_ptr(), 0, 0, workspace(x.device.index, stream).data_ptr(),
        x.shape[0], w.out_features, x.shape[1], x.stride(0), y.stride(0), 0, int(w.paired),
        0 if gemm._one_group(w) else w.groups_per_chunk, w.has_zeros, x.dtype == torch.bfloat16,
        tile, sharing, split, stream,
    )  # fmt: skip


def error(y: Tensor, reference: Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm())


def activations(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(m, k, device="cuda", generator=torch.Generator(device="cuda").manual_seed(m)).to(dtype)


Product = Callable[[Tensor, PackedLinear, Tensor], object]
"""(x, weight, y)"""
SHAPES = pytest.mark.parametrize(
    ("k", "n", "m"), [(5120, 5120, 64), (11008, 1040, 33), (1000, 4112, 300), (128, 20496, 128)]
)


def check_shape(k: int, n: int, m: int, products: Iterable[Product]) -> None:
    """Each product is right, and writes its rows and columns of a wider y alone."""
    w, dense = weight(k, n, 128)
    x, buffer = activations(m, k, torch.float16), torch.full((m + 2, n + 8), float("nan"), device="cuda").half()
    y = buffer[1 : m + 1, :n]
    for product in products:
        buffer.fill_(float("nan"))
        product(x, w, y)
        assert error(y, x.double() @ dense) < 3e-4
        assert buffer[0].isnan().all()
        assert buffer[m + 1].isnan().all()
        assert buffer[:, n:].isnan().all()


def check_same_bits(m: int, product: Product) -> None:
    """Alone, in a graph, and beside another kernel."""
    w, _ = weight(5120, 5120, 128)
    x = activations(m, 5120, torch.float16)
    first, y = (torch.empty(m, 5120, device="cuda", dtype=torch.float16) for _ in range(2))
    product(x, w, first)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        product(x, w, y)
    other, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda", dtype=torch.float16)
    for repeat in range(100):
        if repeat % 2:
            with torch.cuda.stream(other):
                noise @ noise
        y.fill_(float("nan"))
        graph.replay() if repeat % 3 else product(x, w, y)
        assert torch.equal(y, first), repeat


class TestOnHopper:
    pytestmark = hopper

    @pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
    @pytest.mark.parametrize("dtype", BOUND, ids=str)
    def test_every_tile_group_and_zero_point(self, tile: int, dtype: torch.dtype) -> None:
        for group_size in (32, 64, 128, 256, -1):
            for asym in (False, True):
                w, dense = weight(1024, 16 * 33, group_size, asym=asym)
                for m in (65, 100, 257) if tile in SCALED else (1, 17, 100, 257):
                    x, y = activations(m, 1024, dtype), torch.full((m, 528), float("nan"), device="cuda", dtype=dtype)
                    wgmma(x, w, y, tile)
                    assert error(y, x.double() @ dense) < BOUND[dtype], (group_size, asym, m)
                    if tile not in SCALED and dtype == torch.float16:  # all that is lost is lost in rounding y
                        assert error(y, x.double() @ dense) < 2.2e-4, (group_size, asym, m)

    @pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
    @SHAPES
    def test_shapes_cut_along_k_and_whole(self, tile: int, k: int, n: int, m: int) -> None:
        ways = itertools.product((ONE, TWO) if tile < 3 else (ONE,), (ALONG_K, WHOLE))
        check_shape(k, n, m, (partial(wgmma, tile=tile, sharing=sharing, split=split) for sharing, split in ways))

    @pytest.mark.parametrize("m", [33, 64, 65, 128, 129, 255, 256, 257, 384, 1000])
    @pytest.mark.parametrize("dtype", BOUND, ids=str)
    def test_epilogues_and_order(self, m: int, dtype: torch.dtype) -> None:
        w, dense = weight(2048, 2080, 128, order=True, paired=True)
        x, bias, residual = activations(m, 2048, dtype), activations(1, 2080, dtype)[0], activations(m, 2080, dtype)
        plain = x.double() @ dense + bias.double()
        y = residual.clone()
        gemm.gemm(x, w, y, bias=bias, residual=y)
        assert error(y, plain + residual.double()) < BOUND[dtype]
        gate, up = plain.chunk(2, dim=1)
        y = gemm.gemm(x, w, bias=bias, silu_mul=True)
        assert error(y, torch.nn.functional.silu(gate) * up) < 1.6 * BOUND[dtype]

    @pytest.mark.parametrize("m", [48, 100, 256])
    def test_same_bits_alone_in_a_graph_and_in_company(self, m: int) -> None:
        check_same_bits(m, gemm.gemm)

    @pytest.mark.parametrize("sharing", [ONE, TWO])
    def test_launches_in_a_row(self, sharing: int) -> None:
        """A launch starts before the one ahead has ended, and both use one workspace."""
        w, dense = weight(5120, 27648, 128)
        x, y = activations(16, 5120, torch.float16), torch.empty(16, 27648, device="cuda", dtype=torch.float16)
        for _ in range(100):
            wgmma(x, w, y, 1, sharing)
        assert error(y, x.double() @ dense) < 2.2e-4

    def test_two_streams_at_once(self) -> None:
        w, _ = weight(4096, 4096, 128)
        x = activations(128, 4096, torch.float16)
        first, streams = gemm.gemm(x, w), [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        results: list[Tensor] = []
        for _ in range(50):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(gemm.gemm(x, w))
        torch.cuda.synchronize()
        assert all(torch.equal(result, first) for result in results)

    def test_graphs_of_two_streams_at_once(self) -> None:
        """As those of two models in one process: each is replayed on the stream on which it was captured."""
        w, _ = weight(4096, 4096, 128)
        x = activations(128, 4096, torch.float16)
        first = gemm.gemm(x, w)
        torch.cuda.synchronize()
        made: list[tuple[torch.cuda.Stream, torch.cuda.CUDAGraph, Tensor]] = []
        for _ in range(2):
            stream, graph, y = torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.empty_like(first)
            with torch.cuda.stream(stream):
                gemm.gemm(x, w, y)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(20):
                    gemm.gemm(x, w, y)
            made.append((stream, graph, y))
        addresses = {workspace(x.device.index, stream.cuda_stream).data_ptr() for stream, *_ in made}
        assert len(addresses) == 2
        for _ in range(30):
            for stream, graph, y in made:
                with torch.cuda.stream(stream):
                    y.fill_(float("nan"))
                    graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(y, first) for *_, y in made)

    def test_a_bad_row_stays_alone(self) -> None:
        w, _ = weight(1024, 1024, 64, asym=True)
        x = activations(90, 1024, torch.float16)
        clean = gemm.gemm(x, w)
        x[7, 3], x[80, 5] = float("inf"), float("nan")
        y = gemm.gemm(x, w)
        others = [i for i in range(90) if i not in (7, 80)]
        assert torch.equal(y[others], clean[others])
        assert not y[80].isfinite().any()

    def test_strided_rows(self) -> None:
        w, dense = weight(1024, 1024, 128)
        wide = activations(70, 3072, torch.float16)
        x, out = wide[:, 1024:2048], torch.zeros(70, 2048, device="cuda", dtype=torch.float16)
        gemm.gemm(x, w, out[:, 1024:])
        assert error(out[:, 1024:], x.double() @ dense) < 3e-4
        assert not out[:, :1024].any()
