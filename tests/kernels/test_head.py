"""The head's kernels against float64, and the bits of a row whatever it stands among."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_api.kernels import extension, gemm, ops
from gptq_api.kernels.head import _has_wgmma, head

ON_DEVICE = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
KERNELS = pytest.mark.parametrize("kernel", ["head", "head_wgmma"])
TILES = {"head": (8, 16, 32, 64, 128), "head_wgmma": (8, 16, 32, 64, 128, 192, 256)}
"""tokens"""
BOUND = 2.0**-19
"""of a logit's error, over the sum of its products' absolute values"""


def on_device(test: Callable[..., Any]) -> Callable[..., Any]:
    for mark in ON_DEVICE:
        test = mark(test)
    return test


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """There when this returns: kernels ask for weights before the one before them has ended."""
    values = torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)
    torch.cuda.synchronize()
    return values


def fenced(values: Tensor, before: int = 8, behind: int = 8) -> Tensor:
    """The same in a matrix of NaN: columns beside every row, aligned as rows are to be, and rows above and below."""
    rows, width = values.shape
    wide = -(-(before + width + behind) // 8) * 8
    all_of_it = torch.full((rows + 2, wide), torch.nan, dtype=values.dtype, device=values.device)
    inner = all_of_it[1:-1, before : before + width]
    inner.copy_(values)
    return inner


def by_tile(kernel: str, x: Tensor, weight: Tensor, tile: int) -> Tensor:
    if kernel == "head_wgmma" and not _has_wgmma(x.device.index):
        pytest.skip("needs a Hopper and a build for it")
    out = torch.full((len(x), len(weight)), torch.nan, device="cuda")
    product = getattr(extension.cuda, kernel)
    stream = torch.cuda.current_stream().cuda_stream
    sizes = (*out.shape, x.shape[1], x.stride(0), out.stride(0))
    product(weight.data_ptr(), x.data_ptr(), out.data_ptr(), *sizes, x.dtype == torch.bfloat16, tile, stream)
    return out


def assert_close(logits: Tensor, x: Tensor, weight: Tensor) -> None:
    exact = x.double() @ weight.double().t()
    scale = x.double().abs() @ weight.double().abs().t()
    assert logits.dtype == torch.float32
    assert bool(((logits.double() - exact).abs() <= BOUND * scale + 1e-30).all())


@on_device
@DTYPES
@KERNELS
def test_every_tile_against_float64(kernel: str, dtype: torch.dtype) -> None:
    for size, width in ((1, 8), (7, 64), (127, 72), (129, 200), (1000, 1024), (4097, 5120)):
        weight, x = random(size, width, dtype=dtype), random(300, width, dtype=dtype, seed=1)
        for tile in TILES[kernel]:
            for m in (1, 9, 300):
                assert_close(by_tile(kernel, x[:m], weight, tile), x[:m], weight)


@on_device
@DTYPES
@KERNELS
@pytest.mark.parametrize(("size", "width"), [(1000, 328), (32001, 4096)])
def test_every_tile_gives_a_row_the_same_bits(kernel: str, dtype: torch.dtype, size: int, width: int) -> None:
    weight, x = random(size, width, dtype=dtype), random(270, width, dtype=dtype, seed=1)
    first = by_tile(kernel, x, weight, TILES[kernel][0])
    for tile in TILES[kernel]:
        assert torch.equal(by_tile(kernel, x, weight, tile), first), tile
        assert torch.equal(by_tile(kernel, x[200:201], weight, tile), first[200:201]), tile


@on_device
@DTYPES
def test_a_row_has_the_same_bits_at_any_m_in_any_company(dtype: torch.dtype) -> None:
    weight, x = random(2050, 1000, dtype=dtype), random(700, 1000, dtype=dtype, seed=1)
    alone = torch.cat([head(x[i : i + 1], weight) for i in range(len(x))])
    assert_close(alone, x, weight)
    chosen = torch.Generator().manual_seed(2)
    for m in (*range(1, 301), 511, 700):
        rows = torch.randperm(len(x), generator=chosen)[:m].cuda()
        assert torch.equal(head(x[rows], weight), alone[rows]), m


@on_device
@DTYPES
def test_thousands_of_rows(dtype: torch.dtype) -> None:
    weight, x = random(515, 136, dtype=dtype), random(5000, 136, dtype=dtype, seed=1)
    logits = head(x, weight)
    assert_close(logits, x, weight)
    assert torch.equal(logits[4990:], head(x[4990:], weight))


@on_device
@DTYPES
@pytest.mark.parametrize("m", [1, 3, 8, 20, 64, 65, 200])
def test_strides_and_what_stands_around(m: int, dtype: torch.dtype) -> None:
    """NaN around x and the weight is not read; what stands around the logits is not written."""
    for size, width in ((77, 40), (1001, 648)):
        plain_x, plain_weight = random(m, width, dtype=dtype), random(size, width, dtype=dtype, seed=1)
        around = torch.full((size + 2, width), torch.nan, dtype=dtype, device="cuda")
        around[1:-1] = plain_weight
        torch.cuda.synchronize()
        weight, x = around[1:-1], fenced(plain_x)
        assert x.stride(0) > width
        expected = head(plain_x, plain_weight)
        for before in (0, 1, 8):
            everything = torch.full((m + 2, before + size + 3), -7.0, device="cuda")
            out = everything[1:-1, before : before + size]
            assert head(x, weight, out) is out
            assert torch.equal(out, expected)
            out.fill_(-7.0)
            assert bool((everything == -7.0).all())
        # Rows that are not aligned are copied.
        odd = torch.empty(m, width + 1, dtype=dtype, device="cuda")[:, 1:]
        odd.copy_(plain_x)
        assert torch.equal(head(odd, weight), expected)
        assert torch.equal(head(plain_x.t().contiguous().t(), weight), expected)


@on_device
@DTYPES
@pytest.mark.parametrize("m", [2, 8, 30, 100, 250])
def test_a_bad_row_stays_alone(m: int, dtype: torch.dtype) -> None:
    weight, x = random(300, 512, dtype=dtype), random(m, 512, dtype=dtype, seed=1)
    clean = head(x, weight)
    x[0, 3], x[m - 1, 500] = torch.inf, torch.nan
    logits = head(x, weight)
    assert torch.equal(logits[1:-1], clean[1:-1])
    assert not logits[0].isfinite().any() and logits[-1].isnan().all()
    weight[17, 5] = torch.nan  # one token's weights are that logit of every row, and no other
    torch.cuda.synchronize()
    logits = head(x[1:-1], weight)
    assert bool(logits[:, 17].isnan().all())
    others = [i for i in range(300) if i != 17]
    assert torch.equal(logits[:, others], clean[1:-1][:, others])


@on_device
@pytest.mark.parametrize("m", [1, 8, 40, 256])
def test_in_a_graph_between_kernels_that_overlap(m: int) -> None:
    """Each norm overwrites what the head before it reads, and makes what the next one reads."""
    weight, scale = random(5000, 2048, dtype=torch.float16), torch.ones(2048, dtype=torch.float16, device="cuda")
    inputs = [random(m, 2048, dtype=torch.float16, seed=i) for i in range(6)]
    normed, outs = torch.empty_like(inputs[0]), [torch.empty(m, 5000, device="cuda") for _ in inputs]

    def step() -> None:
        for x, out in zip(inputs, outs, strict=True):
            head(ops.rms_norm(x, scale, 1e-5, normed), weight, out)

    step()
    eager = [out.clone() for out in outs]
    for x, out in zip(inputs, eager, strict=True):
        torch.cuda.synchronize()
        assert torch.equal(head(ops.rms_norm(x, scale, 1e-5, normed), weight), out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(20):
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(out, expected) for out, expected in zip(outs, eager, strict=True))


@on_device
def test_no_rows() -> None:
    assert head(random(0, 64, dtype=torch.float16), random(32, 64, dtype=torch.float16)).shape == (0, 32)


@on_device
def test_a_tile_that_no_kernel_has_is_refused() -> None:
    x, weight = random(4, 64, dtype=torch.float16), random(64, 64, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="head M=4 N=64 K=64: cudaErrorInvalidValue"):
        by_tile("head", x, weight, 24)


@pytest.mark.parametrize(
    ("x", "weight", "out", "said"),
    [
        (torch.zeros(2, 16), torch.zeros(3, 16), None, "activations of torch.float32"),
        (torch.zeros(2, 16).half(), torch.zeros(3, 16), None, "weight .* expected contiguous"),
        (torch.zeros(2, 16).half(), torch.zeros(16, 3).half().t(), None, "weight .* expected contiguous"),
        (torch.zeros(2, 12).half(), torch.zeros(3, 12).half(), None, "multiple of 8"),
        (torch.zeros(2, 16).half(), torch.zeros(3, 8).half(), None, "expected .M, 8."),
        (
            torch.zeros(2, 16).half(),
            torch.zeros(3, 16).half(),
            torch.zeros(2, 3).half(),
            "expected .2, 3. torch.fl",
        ),
        (torch.zeros(2, 16).half(), torch.zeros(3, 16).half(), torch.zeros(2, 4), "expected .2, 3. torch.fl"),
        (torch.zeros(2, 16).half(), torch.zeros(3, 16).half(), torch.zeros(3, 2).t(), "last stride 1"),
    ],
    ids=["x type", "weight type", "weight order", "width", "shapes", "out type", "out shape", "out order"],
)
def test_what_does_not_fit_is_refused(x: Tensor, weight: Tensor, out: Tensor | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        head(x, weight, out)
