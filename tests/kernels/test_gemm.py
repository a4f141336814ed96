"""The product on a CUDA device against float64: every format, shape border and fusion, and the same bits every time."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gptq_api.kernels import extension, gemm, probes
from gptq_api.kernels.layout import PackedLinear
from tests.support.cuda_weights import GPTQTensors, random_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available"),
]
ERROR = {torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
DECODE_ROWS = 8
"""of one kernel, on every device"""
ROWS = (1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 64, 100, 128, 255, 256, 257, 1000)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.fixture(autouse=True)
def exact_cublas() -> None:
    """As the CUDA backend asks for."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def packed(w: GPTQTensors, *, paired: bool = False) -> PackedLinear:
    return gemm.pack(w.qweight, w.scales, w.zeros, w.g_idx, w.group_size, "cuda", paired=paired)


def random_x(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator("cuda").manual_seed(m), device="cuda").to(dtype)


def error(y: Tensor, expected: Tensor) -> float:
    """Relative. What rounding the exact result costs beyond the usual is not counted: few elements may all round
    badly."""
    rounding = float((expected.to(y.dtype).double() - expected).norm() / expected.norm())
    usual = {torch.float16: 2.1e-4, torch.bfloat16: 1.7e-3}[y.dtype]
    return float((y.double() - expected).norm() / expected.norm()) - max(0.0, rounding - usual)


@DTYPES
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act-order"])
@pytest.mark.parametrize(("k", "n"), [(1152, 16 * 41), (72, 48), (4232, 2064)])
def test_every_format_and_row_count(
    k: int, n: int, act_order: bool, asym: bool, group_size: int, dtype: torch.dtype
) -> None:
    w = random_weight(k, n, group_size, asym=asym, act_order=act_order, device="cuda")
    weight = packed(w)
    for m in ROWS:
        x = random_x(m, k, dtype)
        y = gemm.gemm(x, weight, torch.full((m, n), torch.nan, dtype=dtype, device="cuda"))
        assert error(y, x.double() @ w.dense) < ERROR[dtype], m


@DTYPES
@pytest.mark.parametrize(
    ("k", "n"), [(4096, 4096), (11008, 4096), (13824, 5120), (14336, 4096), (28672, 1024), (8, 16)]
)
def test_sizes_of_real_layers(k: int, n: int, dtype: torch.dtype) -> None:
    w = random_weight(k, n, 128, asym=False, act_order=True, device="cuda")
    weight = packed(w)
    for m in (1, 2, 8, 13, 32):
        x = random_x(m, k, dtype)
        assert error(gemm.gemm(x, weight), x.double() @ w.dense) < ERROR[dtype], m


@DTYPES
@pytest.mark.parametrize("m", [1, 7, 16, 31, 40, 300])
def test_fusions(m: int, dtype: torch.dtype) -> None:
    k, n = 1024, 2 * 16 * 37
    w = random_weight(k, n, 128, asym=True, act_order=False, device="cuda")
    x, bias = random_x(m, k, dtype), random_x(n, 1, dtype)[:, 0].contiguous()
    full = x.double() @ w.dense + bias.double()
    residual = random_x(m, n, dtype)
    plain, paired = packed(w), packed(w, paired=True)
    for weight in (plain, paired):
        y = gemm.gemm(x, weight, bias=bias, residual=residual)
        assert error(y, full + residual.double()) < ERROR[dtype]
        in_place = residual.clone()
        assert gemm.gemm(x, weight, in_place, bias=bias, residual=in_place) is in_place
        assert torch.equal(in_place, y)
    gate, up = full.split(n // 2, dim=1)
    half = random_x(m, n // 2, dtype)
    expected = functional.silu(gate) * up  # a product of two results, each with an error of its own
    bound = ERROR[dtype] if m <= DECODE_ROWS else 2 * ERROR[dtype]
    assert error(gemm.gemm(x, paired, bias=bias, silu_mul=True), expected) < bound
    assert error(gemm.gemm(x, paired, bias=bias, residual=half, silu_mul=True), expected + half.double()) < bound


@DTYPES
@pytest.mark.parametrize("k", [6656, 5120, 11008, 13824, 28672])
@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act-order"])
def test_a_row_does_not_depend_on_the_rows_beside_it(k: int, act_order: bool, dtype: torch.dtype) -> None:
    weight = packed(random_weight(k, 16 * 150, 128, asym=True, act_order=act_order, device="cuda"))
    x = random_x(DECODE_ROWS, k, dtype)
    whole = gemm.gemm(x, weight)
    for m in range(1, DECODE_ROWS + 1):
        assert torch.equal(gemm.gemm(x[:m], weight), whole[:m]), m
    assert torch.equal(gemm.gemm(x[:1], weight, in_a_row=True), whole[:1])


@DTYPES
@pytest.mark.parametrize("m", [9, 16, 17, 32])
@pytest.mark.parametrize(("k", "n"), [(1152, 656), (11008, 2112)])
def test_the_decode_kernel_takes_32_rows_where_there_is_no_other(k: int, n: int, m: int, dtype: torch.dtype) -> None:
    w = random_weight(k, n, 128, asym=True, act_order=False, device="cuda")
    weight, x = packed(w), random_x(m, k, dtype)
    y = torch.full((m, n), torch.nan, dtype=dtype, device="cuda")
    gemm._decode(x, weight, y, None, None, silu_mul=False, in_a_row=False)
    assert error(y, x.double() @ w.dense) < ERROR[dtype]
    assert torch.equal(y[:DECODE_ROWS], gemm.gemm(x[:DECODE_ROWS], weight))


@DTYPES
@pytest.mark.parametrize("m", [8, 16, 32, 100])
def test_a_row_of_nan_or_inf_spoils_no_other(m: int, dtype: torch.dtype) -> None:
    weight = packed(random_weight(5120, 16 * 150, 128, asym=True, act_order=False, device="cuda"))
    x = random_x(m, 5120, dtype)
    whole = gemm.gemm(x, weight)
    x[3], x[5, 0], x[m - 1, -1] = torch.nan, torch.inf, torch.nan
    clean = [row for row in range(m) if row not in (3, 5, m - 1)]
    spoiled = gemm.gemm(x, weight)
    assert torch.equal(spoiled[clean], whole[clean])
    assert not torch.isfinite(spoiled[[3, m - 1]]).any()


@pytest.mark.parametrize("m", [2, 9, 32, 40])
def test_only_the_output_is_written_and_strides_are_obeyed(m: int) -> None:
    k, n = 1160, 16 * 35
    w = random_weight(k, n, 128, asym=False, act_order=False, device="cuda")
    weight = packed(w)
    wide = random_x(m, k + 24, torch.float16)
    canvas = torch.full((m + 2, n + 16), 7.0, dtype=torch.float16, device="cuda")
    for x in (wide[:, 8 : k + 8], wide[:, 3 : k + 3], wide[:, :k], wide.t().contiguous().t()[:, :k]):
        canvas.fill_(7.0)
        gemm.gemm(x, weight, canvas[1:-1, 8 : n + 8])
        assert error(canvas[1:-1, 8 : n + 8], x.double() @ w.dense) < 3e-4
        canvas[1:-1, 8 : n + 8] = 7.0
        assert torch.all(canvas == 7.0)
    one = random_x(1, k + 24, torch.float16)[:, 1 : k + 1]
    assert error(gemm.gemm(one, weight), one.double() @ w.dense) < 3e-4


@pytest.mark.parametrize(("k", "n"), [(4096, 4096), (11008, 4096), (5120, 640)])
@pytest.mark.parametrize("m", [1, 8, 16, 100])
def test_the_same_bits_every_time(k: int, n: int, m: int) -> None:
    weight = packed(random_weight(k, n, 128, asym=False, act_order=False, device="cuda"))
    x = random_x(m, k, torch.float16)
    expected = gemm.gemm(x, weight).clone()
    y = torch.empty_like(expected)
    for _ in range(100):
        y.fill_(torch.nan)
        assert torch.equal(gemm.gemm(x, weight, y), expected)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):  # launches that overlap one another
            gemm.gemm(x, weight, y)
    other, big = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda", dtype=torch.float16)
    for _ in range(100):
        y.fill_(torch.nan)
        with torch.cuda.stream(other):
            big @ big
        graph.replay()
        assert torch.equal(y, expected)
    torch.cuda.synchronize()


def test_a_chain_sees_what_the_kernel_before_it_wrote() -> None:
    """Programmatic dependent launch: a kernel starts before its input exists."""
    sizes = (4096, 5120, 512, 8192, 4096)
    ws = [random_weight(k, n, 128, asym=False, act_order=False, device="cuda") for k, n in itertools.pairwise(sizes)]
    weights = [packed(w) for w in ws]
    for m in (1, 8, 16):
        x = random_x(m, sizes[0], torch.float16) / 64
        apart = x
        for weight in weights:
            apart = gemm.gemm(apart, weight) / 32
            torch.cuda.synchronize()
        for i in range(20):
            together = x
            for weight in weights:
                together = gemm.gemm(together, weight, in_a_row=i % 2 == 0)
                together = together / 32
            assert torch.equal(together, apart)


@DTYPES
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_dequantize(group_size: int, dtype: torch.dtype) -> None:
    for k, n, asym, paired in ((1152, 656, True, False), (200, 64, False, True), (72, 48, True, False)):
        w = random_weight(k, n, group_size, asym=asym, act_order=True, device="cuda")
        weight = packed(w, paired=paired)
        perm = torch.arange(k, device="cuda") if weight.perm is None else weight.perm.long()
        assert torch.equal(probes.dequantize(weight, dtype), w.dense[perm].t().to(dtype))


@DTYPES
@pytest.mark.parametrize("m", [40, 300])
@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act-order"])
def test_cublas_gets_the_weight_in_blocks(
    act_order: bool, m: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven strips at a time and the rest of four, of paired weights as well; and rounds once."""
    k, n = 4096, 2 * 16 * 37
    monkeypatch.setattr(gemm, "SCRATCH_BYTES", 2 * k * 16 * 7 + 100)
    w = random_weight(k, n, 128, asym=True, act_order=act_order, device="cuda")
    x, bias, residual = random_x(m, k, dtype), random_x(n, 1, dtype)[:, 0].contiguous(), random_x(m, n, dtype)
    product = x.double() @ w.dense
    for weight in (packed(w), packed(w, paired=True)):
        for its_bias, its_residual in itertools.product((None, bias), (None, residual)):
            y = torch.full((m, n), torch.nan, dtype=dtype, device="cuda")
            gemm._by_cublas(x, weight, y, its_bias, its_residual, silu_mul=False)
            expected = product + (0 if its_bias is None else bias.double())
            expected = expected + (0 if its_residual is None else residual.double())
            assert error(y, expected) < ERROR[dtype]
            if its_residual is not None:
                in_place = residual.clone()
                gemm._by_cublas(x, weight, in_place, its_bias, in_place, silu_mul=False)
                assert torch.equal(in_place, y)
    gate, up = (product + bias.double()).split(n // 2, dim=1)
    half = random_x(m, n // 2, dtype)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gemm._by_cublas(x, weight, half, bias, half, silu_mul=True)
    more = torch.cuda.max_memory_allocated() - before - (2 * m * k if act_order else 0)
    assert more < gemm.SCRATCH_BYTES + 6 * 4 * m * 7 * 16 + 2**16, "no more than a block, and its products"
    expected = functional.silu(gate) * up + random_x(m, n // 2, dtype).double()
    assert error(half, expected) < 2 * ERROR[dtype]


def test_packing_on_the_device_gives_the_bytes_of_the_cpu() -> None:
    w = random_weight(1160, 96, 64, asym=True, act_order=True)
    here = gemm.pack(w.qweight, w.scales, w.zeros, w.g_idx, 64, "cpu", paired=True)
    there = gemm.pack(w.qweight, w.scales, w.zeros, w.g_idx, 64, "cuda", paired=True)
    assert torch.equal(here.data, there.data.cpu())
    assert here.perm is not None and there.perm is not None and torch.equal(here.perm, there.perm.cpu())


def test_packing_a_whole_model_takes_seconds() -> None:
    """The 13B bound of the project, on one layer: 40 of them in 3 s."""
    shapes = ((5120, 15360), (5120, 5120), (5120, 27648), (13824, 5120))
    layer = [random_weight(k, n, 128, asym=False, act_order=True, device="cuda") for k, n in shapes]
    for w in layer:
        packed(w)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for w in layer:
        packed(w)
    end.record()
    torch.cuda.synchronize()
    assert start.elapsed_time(end) < 3000 / 40
    assert torch.cuda.max_memory_allocated() - before < 6 * sum(k * n // 2 for k, n in shapes)


def test_a_failed_launch_names_the_shape() -> None:
    weight = packed(random_weight(128, 16, 128, asym=False, act_order=False, device="cuda"))
    x = random_x(1, 128, torch.float16)
    address = (weight.data.data_ptr(), x.data_ptr(), x.data_ptr(), 0, 0)
    with pytest.raises(RuntimeError, match="decode M=33 N=16 K=128"):
        extension.cuda.decode(*address, 33, 16, 128, 128, 16, 0, 0, 1, False, False, False, 0)
