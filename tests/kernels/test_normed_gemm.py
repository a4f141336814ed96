"""A product of RMSNorm(x): where the decode kernel normalizes, it has the bits of a norm and a product apart."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gptq_api.kernels import extension, gemm, normed_gemm, ops
from gptq_api.kernels.layout import PackedLinear
from gptq_api.kernels.ops import Norm
from tests.support.cuda_weights import random_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
ORDERS = pytest.mark.parametrize("ordered", [False, True], ids=["plain", "act-order"])
ROWS = range(1, 9)


@pytest.fixture
def bulk_copies() -> None:
    """The decode kernel that takes a norm."""
    code = extension.compiled_for(torch.cuda.current_device())
    if not 90 <= code < 120:
        pytest.skip(f"the decode kernel of {code / 10:.1f} takes no norm")


def packed(k: int, n: int, group_size: int = 128, *, asym: bool = False, paired: bool = False) -> PackedLinear:
    w = random_weight(k, n, group_size, asym=asym, act_order=False, device="cuda")
    return gemm.pack(w.qweight, w.scales, w.zeros, None, group_size, "cuda", paired=paired)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def random_norm(k: int, dtype: torch.dtype, ordered: bool) -> Norm:
    order = torch.randperm(k, generator=torch.Generator("cuda").manual_seed(5), device="cuda").int()
    return Norm(random(k, dtype=dtype, seed=6), 1e-5, order if ordered else None)


def apart(x: Tensor, norm: Norm) -> Tensor:
    return ops.rms_norm(x, norm.weight, norm.eps, torch.empty_like(x), norm.order)


def bits(y: Tensor) -> Tensor:
    return y.view(torch.int16)


@DTYPES
@ORDERS
@pytest.mark.parametrize("k", [8, 72, 128, 1000, 1032, 1160, 4096, 5120, 6656, 8184, 8192])
@pytest.mark.usefixtures("bulk_copies")
def test_every_width_and_row_count(k: int, ordered: bool, dtype: torch.dtype) -> None:
    """Both with strips for fewer blocks than there are, and with as many that blocks bring x in together."""
    norm = random_norm(k, dtype, ordered)
    for n in (48, 16 * 300):
        weight, x = packed(k, n), random(8, k, dtype=dtype, seed=k) * 3
        whole = gemm.gemm(apart(x, norm), weight)
        for m in ROWS:
            if not gemm.normalizes(weight, m, norm):
                assert m > normed_gemm.NORMALIZES_MAX_M and ordered and k > 4096, (m, n)
                continue
            y = torch.full((m, n), torch.nan, dtype=dtype, device="cuda")
            gemm.gemm(x[:m], weight, y, norm=norm)
            assert torch.equal(bits(y), bits(whole[:m])), (m, n)


@DTYPES
@ORDERS
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.usefixtures("bulk_copies")
def test_every_format_and_fusion(group_size: int, asym: bool, ordered: bool, dtype: torch.dtype) -> None:
    k, n = 1160, 2 * 16 * 75
    norm, bias = random_norm(k, dtype, ordered), random(n, dtype=dtype, seed=1)
    plain, paired = (packed(k, n, group_size, asym=asym, paired=paired) for paired in (False, True))
    for m in (1, 2, 3, 4, 7, 8):
        x, residual = random(m, k, dtype=dtype, seed=m), random(m, n, dtype=dtype, seed=2)
        half = residual[:, : n // 2].contiguous()
        for weight, silu_mul, its_bias, added in (
            (plain, False, None, None),
            (plain, False, bias, residual),
            (paired, False, bias, residual),
            (paired, True, None, None),
            (paired, True, bias, half),
        ):
            how = {"bias": its_bias, "residual": added, "silu_mul": silu_mul}
            before = x.clone()
            y = gemm.gemm(x, weight, norm=norm, **how)  # type: ignore[arg-type]
            expected = gemm.gemm(apart(x, norm), weight, **how)  # type: ignore[arg-type]
            assert torch.equal(bits(y), bits(expected)), (m, silu_mul)
            assert torch.equal(x, before), "x is the residual stream, and stays as it is"


@DTYPES
@ORDERS
@pytest.mark.usefixtures("bulk_copies")
def test_a_row_that_is_not_finite_spoils_no_other(ordered: bool, dtype: torch.dtype) -> None:
    norm, weight = random_norm(5120, dtype, ordered), packed(5120, 16 * 150, asym=True)
    x = random(4, 5120, dtype=dtype)
    whole = gemm.gemm(x, weight, norm=norm)
    x[1], x[3, 7] = torch.nan, torch.inf
    spoiled = gemm.gemm(x, weight, norm=norm)
    assert torch.equal(spoiled[[0, 2]], whole[[0, 2]])
    assert not torch.isfinite(spoiled[[1, 3]]).any()
    zeros = torch.zeros(1, 5120, dtype=dtype, device="cuda")
    assert not gemm.gemm(zeros, weight, norm=norm).any()


@ORDERS
@pytest.mark.usefixtures("bulk_copies")
def test_layers_see_what_the_kernel_before_wrote_and_in_graphs(ordered: bool) -> None:
    """Programmatic dependent launch: blocks begin before x exists; and the residual stream is written in place."""
    k, inner = 5120, 16 * 400
    weights = [packed(k, 2 * inner, paired=True) for _ in range(3)]
    downs = [packed(inner, k) for _ in range(3)]
    norm = random_norm(k, torch.float16, ordered)
    for m in (1, 2, 4):
        start = random(m, k, dtype=torch.float16, seed=9)

        def layers(x: Tensor, *, together: bool) -> Tensor:
            for weight, down in zip(weights, downs, strict=True):
                y = gemm.gemm(x, weight, silu_mul=True, norm=norm) if together else None
                if y is None:
                    y = gemm.gemm(apart(x, norm), weight, silu_mul=True)
                    torch.cuda.synchronize()
                gemm.gemm(y / 64, down, x, residual=x)
            return x

        expected = layers(start.clone(), together=False)
        x = start.clone()
        for _ in range(20):
            assert torch.equal(layers(x.copy_(start), together=True), expected)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            x.copy_(start)
            layers(x, together=True)
        for _ in range(20):
            x.fill_(torch.nan)
            graph.replay()
            assert torch.equal(x, expected), m


@pytest.mark.usefixtures("bulk_copies")
def test_strides_of_rows_are_obeyed() -> None:
    norm, weight = random_norm(1160, torch.float16, ordered=False), packed(1160, 560)
    wide = random(4, 1160 + 24, dtype=torch.float16)
    expected = gemm.gemm(apart(wide[:, 8:1168].contiguous(), norm), weight)
    canvas = torch.full((6, 560 + 16), 7.0, dtype=torch.float16, device="cuda")
    gemm.gemm(wide[:, 8:1168], weight, canvas[1:-1, 8:568], norm=norm)
    assert torch.equal(canvas[1:-1, 8:568], expected)
    canvas[1:-1, 8:568] = 7.0
    assert torch.all(canvas == 7.0)


@DTYPES
@ORDERS
@pytest.mark.parametrize("k", [1160, 5120, 8200, 13824])
def test_the_same_bits_whoever_normalizes(k: int, ordered: bool, dtype: torch.dtype) -> None:
    """On every device: with few rows and many, with widths that no block has all of."""
    norm, weight = random_norm(k, dtype, ordered), packed(k, 16 * 40, asym=True)
    x = random(20, k, dtype=dtype)
    for m, same_bits in itertools.product((0, 1, 4, 5, 8, 9, 20), (False, True)):
        normed, out = torch.full_like(x[:m], torch.nan), torch.empty(m, 16 * 40, dtype=dtype, device="cuda")
        assert normed_gemm.normed_gemm(x[:m], norm, weight, out, normed, same_bits=same_bits) is out
        expected = gemm.gemm(apart(x[:m], norm), weight, same_bits=same_bits)
        assert torch.equal(bits(out), bits(expected)), (m, same_bits)


def test_what_it_does_not_take() -> None:
    norm, weight = random_norm(256, torch.float16, ordered=True), packed(256, 32)
    x = random(9, 256, dtype=torch.float16)
    with pytest.raises(ValueError, match="no kernel normalizes 9 rows"):
        gemm.gemm(x, weight, norm=norm)
    with pytest.raises(ValueError, match="the norm's weight"):
        gemm.gemm(x[:1], weight, norm=Norm(norm.weight[:128], 1e-5))
    with pytest.raises(ValueError, match="the norm's order"):
        gemm.gemm(x[:1], weight, norm=Norm(norm.weight, 1e-5, torch.arange(256, device="cuda")))
