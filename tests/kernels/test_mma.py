"""The mma kernels, which serve from 9 rows on where there is no wgmma: against float64, on any GPU with our kernels."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from gptq_api.kernels import extension, gemm
from gptq_api.kernels.layout import PackedLinear
from tests.kernels.test_wgmma import (
    ALONG_K,
    BOUND,
    SHAPES,
    WHOLE,
    activations,
    check_same_bits,
    check_shape,
    error,
    weight,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available"),
]
TILES = {"128x16": 1, "128x32": 2, "128x64": 3, "256x64": 4, "256x128": 5}
SCALED = (5,)
"""whose operand is weight times scale rounded to 16 bits; used for large weights and many tokens only"""


@pytest.fixture(scope="module")
def workspace() -> Tensor:
    return torch.zeros(extension.cuda.mma_workspace_bytes(), dtype=torch.uint8, device="cuda")


def mma(
    x: Tensor,
    w: PackedLinear,
    y: Tensor,
    workspace: Tensor,
    tile: int = 0,
    split: int = 0,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    silu_mul: bool = False,
) -> None:
    """The kernel whatever the device, a tile of the table whatever M is; x in the packed order."""
    pairing = (2 if silu_mul else 1) if w.paired else 0
    extension.cuda.mma(
        *(w.data.data_ptr(), x.data_ptr(), y.data_ptr(), gemm._address(bias), gemm._address(residual)),
        *(workspace.data_ptr(), x.shape[0], w.out_features, x.shape[1], x.stride(0), y.stride(0)),
        *(0 if residual is None else residual.stride(0), pairing, w.groups_per_chunk, w.has_zeros),
        *(x.dtype == torch.bfloat16, tile, split, gemm._stream(x)),
    )


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_every_tile_group_and_zero_point(tile: int, dtype: torch.dtype, workspace: Tensor) -> None:
    for group_size in (32, 64, 128, 256, -1):
        for asym in (False, True):
            w, dense = weight(1024, 16 * 33, group_size, asym=asym)
            for m in (100, 257) if tile in SCALED else (1, 17, 100, 257):
                x, y = activations(m, 1024, dtype), torch.full((m, 528), float("nan"), device="cuda", dtype=dtype)
                mma(x, w, y, workspace, tile)
                assert error(y, x.double() @ dense) < BOUND[dtype], (group_size, asym, m)
                if tile not in SCALED and dtype == torch.float16:  # all that is lost is lost in rounding y
                    assert error(y, x.double() @ dense) < 2.2e-4, (group_size, asym, m)


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@SHAPES
def test_shapes_cut_along_k_and_whole(tile: int, k: int, n: int, m: int, workspace: Tensor) -> None:
    check_shape(k, n, m, (partial(mma, workspace=workspace, tile=tile, split=split) for split in (ALONG_K, WHOLE)))


@pytest.mark.parametrize("m", [9, 16, 17, 33, 64, 65, 128, 129, 256, 1000])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_epilogues(m: int, dtype: torch.dtype, workspace: Tensor) -> None:
    w, dense = weight(2048, 2080, 128, paired=True)
    x, bias, residual = activations(m, 2048, dtype), activations(1, 2080, dtype)[0], activations(m, 2080, dtype)
    plain = x.double() @ dense + bias.double()
    y = residual.clone()
    mma(x, w, y, workspace, bias=bias, residual=y)
    assert error(y, plain + residual.double()) < BOUND[dtype]
    gate, up = plain.chunk(2, dim=1)
    expected, half = torch.nn.functional.silu(gate) * up, residual[:, :1040].contiguous()
    y = torch.empty_like(half)
    mma(x, w, y, workspace, bias=bias, silu_mul=True)
    assert error(y, expected) < 1.6 * BOUND[dtype]
    mma(x, w, y, workspace, bias=bias, residual=half, silu_mul=True)
    assert error(y, expected + half.double()) < 1.6 * BOUND[dtype]


@pytest.mark.parametrize("m", [12, 24, 48, 100, 256])
def test_same_bits_alone_in_a_graph_and_in_company(m: int, workspace: Tensor) -> None:
    check_same_bits(m, partial(mma, workspace=workspace))


def test_two_streams_at_once() -> None:
    w, _ = weight(4096, 4096, 128)
    x = activations(128, 4096, torch.float16)
    streams = [torch.cuda.Stream() for _ in range(2)]
    size = extension.cuda.mma_workspace_bytes()
    workspaces = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in streams]
    first = torch.empty(128, 4096, device="cuda", dtype=torch.float16)
    mma(x, w, first, workspaces[0])
    results = [torch.empty_like(first) for _ in range(100)]
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        with torch.cuda.stream(streams[i % 2]):
            mma(x, w, result, workspaces[i % 2])
    torch.cuda.synchronize()
    assert all(torch.equal(result, first) for result in results)


def test_a_bad_row_stays_alone(workspace: Tensor) -> None:
    w, _ = weight(1024, 1024, 64, asym=True)
    x = activations(90, 1024, torch.float16)
    clean, y = (torch.empty(90, 1024, device="cuda", dtype=torch.float16) for _ in range(2))
    mma(x, w, clean, workspace)
    x[7, 3], x[80, 5] = float("inf"), float("nan")
    mma(x, w, y, workspace)
    others = [i for i in range(90) if i not in (7, 80)]
    assert torch.equal(y[others], clean[others])
    assert not y[80].isfinite().any()


def test_a_row_ends_where_k_does(workspace: Tensor) -> None:
    """What lies behind a row in memory is not multiplied, not even by zero."""
    w, dense = weight(1000, 512, 128)
    wide = torch.full((40, 1024), float("nan"), device="cuda", dtype=torch.float16)
    wide[:, :1000] = activations(40, 1000, torch.float16)
    y = torch.empty(40, 512, device="cuda", dtype=torch.float16)
    mma(wide[:, :1000], w, y, workspace)
    assert error(y, wide[:, :1000].double() @ dense) < 3e-4
    mma(wide[:8, :1000], w, y[:8], workspace, 1)
    assert error(y[:8], wide[:8, :1000].double() @ dense) < 3e-4
    assert error(gemm.gemm(wide[:8, :1000], w), wide[:8, :1000].double() @ dense) < 3e-4
