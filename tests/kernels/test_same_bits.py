"""Products with `same_bits`: each row has the bits that the decode kernel gives it alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gptq_api.kernels import extension, gemm
from gptq_api.kernels.layout import PackedLinear
from gptq_api.kernels.workspace import has_wgmma
from gptq_api.runner.cuda.linear import PackedGPTQLinear
from tests.kernels.test_wgmma import ALONG_K, BOUND, WHOLE, activations, check_same_bits, error, weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available"),
]
KERNELS = {
    "same_bits": {"128x16": 1, "128x32": 2, "128x64": 3},
    "same_bits_wgmma": {"128x16": 1, "128x32": 2, "128x64": 3, "128x96": 4, "128x128": 5},
}
"""for any GPU, and for a Hopper: their tiles"""
ROWS = (9, 16, 17, 31, 64, 100, 128, 257, 600)
Launch = Callable[..., None]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which `gemm` takes."""
    name: str = request.param
    if name == "same_bits_wgmma" and not has_wgmma(torch.cuda.current_device()):
        pytest.skip("needs compute capability 9.0, and kernels compiled for it")
    monkeypatch.setattr(gemm, "_same_bits_kernel", lambda index: getattr(extension.cuda, name))
    return name


@pytest.fixture
def by_tile(kernel: str) -> Launch:
    """The kernel whatever M is, by a tile of the table."""
    workspace = torch.zeros(extension.cuda.same_bits_workspace_bytes(), dtype=torch.uint8, device="cuda")

    def launch(x: Tensor, w: PackedLinear, y: Tensor, tile: int = 0, split: int = 0) -> None:
        getattr(extension.cuda, kernel)(
            *(w.data.data_ptr(), x.data_ptr(), y.data_ptr(), 0, 0, workspace.data_ptr()),
            *(x.shape[0], w.out_features, x.shape[1], x.stride(0), y.stride(0), 0, int(w.paired)),
            *(w.groups_per_chunk, w.has_zeros, x.dtype == torch.bfloat16, tile, split, gemm._stream(x)),
        )

    return launch


def rows_alone(
    x: Tensor, w: PackedLinear, at_once: int = 1, *, residual: Tensor | None = None, **how: object
) -> Tensor:
    """By the decode kernel."""
    parts = range(0, len(x), at_once)
    residuals = [None if residual is None else residual[i : i + at_once] for i in parts]
    return torch.cat(
        [gemm.gemm(x[i : i + at_once], w, residual=r, **how) for i, r in zip(parts, residuals, strict=True)]  # type: ignore[arg-type]
    )


def bits(y: Tensor) -> Tensor:
    """-0 is not 0, and a NaN is itself."""
    return y.contiguous().view(torch.int16)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.usefixtures("kernel")
def test_each_row_as_alone_and_among_eight(group_size: int, asym: bool, dtype: torch.dtype) -> None:
    w, dense = weight(1160, 528, group_size, asym=asym)
    x = activations(max(ROWS), 1160, dtype)
    alone = rows_alone(x, w)
    assert error(alone, x.double() @ dense) < BOUND[dtype]
    assert torch.equal(bits(rows_alone(x, w, 8)), bits(alone))
    for m in ROWS:
        assert torch.equal(bits(gemm.gemm(x[:m], w, same_bits=True)), bits(alone[:m])), m


@pytest.mark.parametrize(
    ("k", "n", "group_size", "asym"),
    [
        (128, 20496, 128, False),  # one chunk: fewer chains than warps
        (1000, 4112, 64, True),
        (5120, 5120, 128, False),
        (13824, 1040, 32, True),  # segments of k where the decode kernel has clusters
        (14336, 4096, 128, False),
        (28672, 528, 128, True),
    ],
)
def test_every_tile_cut_along_k_and_whole(
    kernel: str, by_tile: Launch, k: int, n: int, group_size: int, asym: bool
) -> None:
    w, _ = weight(k, n, group_size, asym=asym)
    for dtype in BOUND:
        x = activations(130, k, dtype)
        alone = rows_alone(x, w, 4)
        assert torch.equal(bits(rows_alone(x[:8], w)), bits(alone[:8]))
        for m, tile, split in itertools.product((7, 65, 130), KERNELS[kernel].values(), (0, ALONG_K, WHOLE)):
            buffer = torch.full((m + 2, n + 8), float("nan"), device="cuda", dtype=dtype)
            by_tile(x[:m], w, buffer[1 : m + 1, :n], tile, split)
            assert torch.equal(bits(buffer[1 : m + 1, :n]), bits(alone[:m])), (dtype, m, tile, split)
            buffer[1 : m + 1, :n] = float("nan")
            assert buffer.isnan().all(), (dtype, m, tile, split)


def test_every_call_gives_them(kernel: str, by_tile: Launch) -> None:
    """However copies into the ring overtake one another: the memory that they come from is cold, and then it is not."""
    w, _ = weight(28672, 528, 128, asym=True)
    x = activations(130, 28672, torch.float16)
    alone, cold = rows_alone(x, w, 4), torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for tile in KERNELS[kernel].values():
        for call in range(100):
            y = torch.empty_like(alone)
            if call % 2 == 0:
                cold.zero_()
            by_tile(x, w, y, tile, 0)
            assert torch.equal(bits(y), bits(alone)), (tile, call)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(("k", "group_size", "asym"), [(2048, 128, False), (13824, 32, True)])
@pytest.mark.usefixtures("kernel")
def test_epilogues_and_act_order(k: int, group_size: int, asym: bool, dtype: torch.dtype) -> None:
    w, _ = weight(k, 2080, group_size, asym=asym, order=True, paired=True)
    x, bias, residual = activations(100, k, dtype), activations(1, 2080, dtype)[0], activations(100, 2080, dtype)
    half = residual[:, :1040].contiguous()
    for how, added in (
        ({}, None),
        ({"bias": bias}, None),
        ({"bias": bias}, residual),
        ({"silu_mul": True}, None),
        ({"silu_mul": True, "bias": bias}, half),
        ({"silu_mul": True}, residual[:, 1:1041]),  # not aligned
    ):
        alone = rows_alone(x, w, residual=added, **how)
        for m in (9, 40, 100):
            some = None if added is None else added[:m]
            y = gemm.gemm(x[:m], w, residual=some, same_bits=True, **how)
            assert torch.equal(bits(y), bits(alone[:m])), (m, sorted(how))
    y = residual.clone()
    gemm.gemm(x, w, y, bias=bias, residual=y, same_bits=True)
    assert torch.equal(bits(y), bits(rows_alone(x, w, residual=residual, bias=bias)))
    wide = torch.full((100, 2085), float("nan"), device="cuda", dtype=dtype)
    gemm.gemm(x, w, wide[:, 3:2083], same_bits=True)
    assert torch.equal(bits(wide[:, 3:2083]), bits(rows_alone(x, w)))
    assert wide[:, :3].isnan().all()
    assert wide[:, 2083:].isnan().all()


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_numbers_of_every_size(kernel: str, by_tile: Launch, dtype: torch.dtype) -> None:
    """Zeros of either sign, subnormal and very large numbers, and rows that are not finite."""
    for group_size, asym in ((128, False), (32, True)):
        w, _ = weight(5120, 1040, group_size, asym=asym)
        g = torch.Generator(device="cuda").manual_seed(3)
        exponents = torch.randint(-24, 15, (90, 5120), device="cuda", generator=g)
        x = torch.ldexp(torch.randn(90, 5120, device="cuda", generator=g), exponents).clamp(-6e4, 6e4).to(dtype)
        x[1], x[2], x[3, 7], x[4, 9], x[5] = 0.0, -0.0, float("inf"), float("nan"), x[5] * 2.0**-14
        x[6] = torch.where(torch.arange(5120, device="cuda") % 700 == 5, x[6], 0.0)
        alone = rows_alone(x, w)
        for tile in KERNELS[kernel].values():
            y = torch.empty_like(alone)
            by_tile(x, w, y, tile)
            assert torch.equal(bits(y), bits(alone)), (group_size, tile)


@pytest.mark.parametrize("m", [12, 48, 100, 256])
def test_same_bits_alone_in_a_graph_and_in_company(m: int, by_tile: Launch) -> None:
    check_same_bits(m, by_tile)


@pytest.mark.usefixtures("kernel")
def test_two_streams_at_once() -> None:
    w, _ = weight(5120, 5120, 128)
    x = activations(128, 5120, torch.float16)
    streams = [torch.cuda.Stream() for _ in range(2)]
    first = gemm.gemm(x, w, same_bits=True)
    results = [torch.empty_like(first) for _ in range(100)]
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        with torch.cuda.stream(streams[i % 2]):
            gemm.gemm(x, w, result, same_bits=True)
    torch.cuda.synchronize()
    assert all(torch.equal(result, first) for result in results)


@pytest.mark.usefixtures("kernel")
def test_a_row_ends_where_k_does() -> None:
    """What lies behind a row in memory is not multiplied, not even by zero."""
    w, _ = weight(1000, 512, 128)
    wide = torch.full((40, 1024), float("nan"), device="cuda", dtype=torch.float16)
    wide[:, :1000] = activations(40, 1000, torch.float16)
    y = gemm.gemm(wide[:, :1000], w, same_bits=True)
    assert torch.equal(bits(y), bits(rows_alone(wide[:, :1000].contiguous(), w)))


@pytest.mark.usefixtures("kernel")
def test_a_linear_is_told_once() -> None:
    w, _ = weight(2048, 2080, 128, order=True)
    x = activations(300, 2048, torch.bfloat16)
    bias = activations(1, 2080, torch.bfloat16)[0]
    linear = PackedGPTQLinear(w, bias, sorted_by_producer=False, same_bits=True)
    alone = torch.cat([linear.forward(x[i : i + 1]) for i in range(300)])
    for m in ROWS[:-1]:
        assert torch.equal(linear.forward(x[:m]), alone[:m])
    sorted_x = gemm.sort_activations(x, w)
    assert torch.equal(linear.in_order().forward(sorted_x), alone)
    graph, y = torch.cuda.CUDAGraph(), torch.empty_like(alone)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):  # on a stream that has no workspace yet
        linear.forward(x, y)
    graph.replay()
    assert torch.equal(y, alone)
