"""Products with `one_order`: a row has the same bits whatever the number of rows."""

from __future__ import annotations

import pytest
import torch

from gptq_api.kernels import gemm
from tests.kernels.test_same_bits import bits
from tests.kernels.test_wgmma import BOUND, activations, error, weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available"),
]
ROWS = (1, 2, 9, 17, 64, 65, 128, 129, 192, 300, 1000, 1500, 2047)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize(("k", "n"), [(1160, 528), (5120, 5120), (13824, 1040)])
def test_rows_in_any_company(k: int, n: int, group_size: int, dtype: torch.dtype) -> None:
    """Small weights, whose sums are scaled, and large ones, whose operands are."""
    w, dense = weight(k, n, group_size, asym=group_size != 128)
    x = activations(max(ROWS), k, dtype)
    among_all = gemm.gemm(x, w, one_order=True)
    assert error(among_all, x.double() @ dense) < BOUND[dtype]
    for m in ROWS:
        assert torch.equal(bits(gemm.gemm(x[:m], w, one_order=True)), bits(among_all[:m])), m
        first = max(ROWS) - m
        assert torch.equal(bits(gemm.gemm(x[first:], w, one_order=True)), bits(among_all[first:])), m


@pytest.mark.parametrize("silu_mul", [False, True], ids=["plain", "silu"])
def test_with_all_that_a_product_may_do_beside(silu_mul: bool) -> None:
    w, _ = weight(1160, 1056, 64, asym=True, order=True, paired=True)
    x = activations(700, 1160, torch.float16)
    bias = torch.randn(1056, device="cuda").half()
    residual = torch.randn(700, 528 if silu_mul else 1056, device="cuda").half()
    whole = gemm.gemm(x, w, bias=bias, residual=residual, silu_mul=silu_mul, one_order=True)
    fast = gemm.gemm(x, w, bias=bias, residual=residual, silu_mul=silu_mul)
    assert error(whole, fast.double()) < 2 * BOUND[torch.float16]  # both are rounded
    for m in (1, 8, 33, 200):
        some = slice(100, 100 + m)
        part = gemm.gemm(x[some], w, bias=bias, residual=residual[some], silu_mul=silu_mul, one_order=True)
        assert torch.equal(bits(part), bits(whole[some])), m
