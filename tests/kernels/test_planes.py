"""Weights of 8 bits in two planes of nibbles: on the CPU read back the way a warp reads them, against the formula of
the format, exactly; on a CUDA device multiplied, against float64, with the same bits for any number of rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gptq_api.kernels import gemm, planes, probes
from gptq_api.kernels.layout import PackedLinear
from gptq_api.runner.cuda.linear import PackedGateUp, PackedGPTQLinear, PackedHead
from tests.support.cuda_weights import GPTQTensors, random_weight

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
GROUPS = pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
ASYM = pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
ACT_ORDER = pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act-order"])
ERROR = {torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
FLOAT_ERROR = {torch.float16: 2e-5, torch.bfloat16: 1e-4}
"""of sums; of bfloat16 they are of 128 + nibble, and the 128 is subtracted in the end"""
ROWS = (1, 2, 5, 8, 9, 16, 17, 24, 25, 31, 64, 100, 129, 257, 300)
needs_gpu = pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available")


def weight_of_bytes(
    k: int, n: int, group_size: int, asym: bool, act_order: bool = False, device: str = "cpu"
) -> tuple[PackedLinear, Tensor]:
    """Packed, and float64 [K, N]."""
    w = random_weight(k, n, group_size, asym=asym, act_order=act_order, device=device, bits=8)
    return packed(w, device), w.dense


def packed(w: GPTQTensors, device: str, out_order: Tensor | None = None) -> PackedLinear:
    zeros = torch.full_like(w.scales, 128, dtype=torch.uint8) if w.zeros is None else w.zeros
    return planes.pack_bytes(w.qweight, w.scales, zeros, w.g_idx, w.group_size, device, out_order=out_order)


@GROUPS
@ASYM
@ACT_ORDER
@pytest.mark.parametrize(("k", "n"), [(256, 48), (328, 8), (640, 32)])
def test_two_planes_are_the_weight_exactly(k: int, n: int, group_size: int, asym: bool, act_order: bool) -> None:
    found, dense = weight_of_bytes(k, n, group_size, asym, act_order)
    assert (found.out_features, found.num_rows, found.has_zeros) == (n, 2 * n, True)
    assert torch.equal(probes.emulate(found), dense)


def test_outputs_are_packed_in_any_order_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    w, order = random_weight(136, 48, 32, asym=True, act_order=True, bits=8), torch.randperm(48)
    whole = packed(w, "cpu", order)
    assert torch.equal(probes.emulate(whole), w.dense[:, order])
    monkeypatch.setattr(planes, "_BLOCK_WEIGHTS", 136 * 20)
    assert torch.equal(packed(w, "cpu", order).data, whole.data)


def test_scales_of_which_16_are_no_number_are_refused() -> None:
    w = random_weight(128, 16, 128, asym=True, act_order=False, bits=8)
    assert w.zeros is not None
    for scale, said in ((4096.0, "a scale of 4096; .* up to 4094"), (float("inf"), "inf"), (float("nan"), "nan")):
        with pytest.raises(ValueError, match=said):
            planes.pack_bytes(w.qweight, torch.full_like(w.scales, scale), w.zeros, None, 128, "cpu")
    scales = torch.full_like(w.scales, 4094.0)
    scales[0, 0] = 2.0**-24
    found = planes.pack_bytes(w.qweight, scales, w.zeros, None, 128, "cpu")
    values = w.dense / w.scales.double()
    assert torch.equal(probes.emulate(found), values.round() * scales.double())


@pytest.mark.parametrize(
    ("k", "n", "group_size", "said"), [(128, 12, 128, "12 output"), (132, 16, -1, "132 input"), (128, 16, 48, "48")]
)
def test_what_cannot_be_held_is_refused_by_name(k: int, n: int, group_size: int, said: str) -> None:
    assert said in str(gemm.refusal(8, k, n, group_size))
    assert gemm.refusal(8, 128, 8, 128) is None


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "shifted"])
@pytest.mark.parametrize(("size", "width"), [(96, 256), (51, 200)])
def test_a_rounded_head_is_near_its_weight(size: int, width: int, kind: str) -> None:
    g = torch.Generator().manual_seed(size)
    weight = torch.randn(size, width, generator=g) * 0.02
    if kind == "heavy tails":
        weight = weight * weight.abs() * 50
    weight = (weight + (0.1 if kind == "shifted" else 0)).half()
    weight[3], weight[4, 10:] = 0.0, 0.0
    found = planes.pack_head(weight, "cpu")
    assert found.out_features == -(-size // 8) * 8 and planes.head_bytes(size, width) == found.data.numel()
    dense = probes.emulate(found).t()
    assert torch.count_nonzero(dense[size:]) == torch.count_nonzero(dense[3]) == 0
    assert torch.count_nonzero(dense[:size][weight == 0]) == 0
    for first in range(0, width, planes.HEAD_GROUP):
        part = weight[:, first : first + planes.HEAD_GROUP].double()
        step = (part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)) / 255
        error = (dense[:size, first : first + planes.HEAD_GROUP] - part).abs().amax(1)
        assert bool((error <= 0.63 * step + 1e-7).all())  # half a step, and what rounding the scale moves the last one
    x = torch.randn(20, width, generator=g, dtype=torch.float64)
    logits = x @ weight.double().t()
    assert (x @ dense[:size].t() - logits).norm() < 0.012 * logits.norm()


def test_a_head_beyond_float16_is_refused() -> None:
    with pytest.raises(ValueError, match="take scales up to 4094"):
        planes.pack_head(torch.full((8, 128), 2e6), "cpu")


def test_arguments_are_checked_before_any_address_is_taken() -> None:
    weight, _ = weight_of_bytes(128, 16, 128, asym=True)
    x, y = torch.zeros(1, 128, dtype=torch.float16), torch.zeros(1, 16, dtype=torch.float16)
    with pytest.raises(ValueError, match="paired"):
        gemm.gemm(x, weight, silu_mul=True)
    with pytest.raises(ValueError, match="no residual beside it"):
        gemm.gemm(x, weight, silu_times=y, residual=y)
    with pytest.raises(ValueError, match=r"silu_times .* expected \(1, 16\)"):
        gemm.gemm(x, weight, silu_times=y[:, :8])
    with pytest.raises(ValueError, match=r"bias .* expected \(16,\)"):
        gemm.gemm(x, weight, bias=torch.zeros(32, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"out .* expected .* torch\.float16"):
        gemm.gemm(x, weight, torch.zeros(1, 16))
    of_four = random_weight(128, 16, 128, asym=False, act_order=False)
    with pytest.raises(ValueError, match="two planes"):
        gemm.gemm(x, gemm.pack(of_four.qweight, of_four.scales, None, None, 128, "cpu"), silu_times=y)


def error(y: Tensor, expected: Tensor) -> float:
    """Relative; of 16 bits without what rounding the exact result costs beyond the usual, as few elements may."""
    rounding = float((expected.to(y.dtype).double() - expected).norm() / expected.norm())
    usual = {torch.float16: 2.1e-4, torch.bfloat16: 1.7e-3, torch.float32: 1.0}[y.dtype]
    return float((y.double() - expected).norm() / expected.norm()) - max(0.0, rounding - usual)


def random_x(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator("cuda").manual_seed(m), device="cuda").to(dtype)


def bits(y: Tensor) -> Tensor:
    return y.contiguous().view(torch.int32 if y.dtype == torch.float32 else torch.int16)


@pytest.mark.gpu
@needs_gpu
@GROUPS
@ACT_ORDER
def test_the_device_packs_the_same_bytes(group_size: int, act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for k, n, block in ((328, 32, 2**24), (1024, 528, 1024 * 100)):
        monkeypatch.setattr(planes, "_BLOCK_WEIGHTS", block)
        w = random_weight(k, n, group_size, asym=True, act_order=act_order, bits=8)
        for order in (None, torch.randperm(n)):
            here, there = packed(w, "cpu", order), packed(w, "cuda", order)
            assert torch.equal(here.data, there.data.cpu())
    weight = torch.randn(1001, 200).half()
    near = (planes.pack_head(weight, device) for device in ("cpu", "cuda"))
    here_head, there_head = (probes.emulate(head) for head in near)
    assert (here_head - there_head).abs().max() < 0.05  # a tie may be rounded otherwise


@pytest.mark.gpu
@needs_gpu
@DTYPES
@GROUPS
@ASYM
@ACT_ORDER
@pytest.mark.parametrize(("k", "n"), [(1152, 8 * 41), (72, 24), (4232, 2064)])
def test_products(k: int, n: int, act_order: bool, asym: bool, group_size: int, dtype: torch.dtype) -> None:
    """Every format and number of rows; with `same_bits` and in float32 as well."""
    weight, dense = weight_of_bytes(k, n, group_size, asym, act_order, "cuda")
    x = random_x(max(ROWS), k, dtype)
    expected = x.double() @ dense
    alone = torch.cat([gemm.gemm(row, weight) for row in x.split(1)])
    floats = torch.cat([gemm.gemm(row, weight, expected[:1].float(), same_bits=True) for row in x.split(8)[0].split(1)])
    assert error(floats, expected[:8]) < FLOAT_ERROR[dtype]
    assert torch.equal(bits(floats.to(dtype)), bits(alone[:8]))
    for m in ROWS:
        y = gemm.gemm(x[:m], weight, torch.full((m, n), torch.nan, dtype=dtype, device="cuda"))
        assert error(y, expected[:m]) < ERROR[dtype], m
        assert m > 8 or torch.equal(bits(y), bits(alone[:m])), m
        assert torch.equal(bits(gemm.gemm(x[:m], weight, same_bits=True)), bits(alone[:m])), m
        y = gemm.gemm(x[:m], weight, torch.full((m, n), torch.nan, device="cuda"), same_bits=True)
        assert torch.equal(bits(y[:8]), bits(floats[:m])) and torch.equal(bits(y.to(dtype)), bits(alone[:m])), m


@pytest.mark.gpu
@needs_gpu
@DTYPES
@pytest.mark.parametrize("m", [1, 7, 9, 16, 31, 40, 300])
@pytest.mark.parametrize("same_bits", [False, True], ids=["", "same bits"])
def test_fusions(same_bits: bool, m: int, dtype: torch.dtype) -> None:
    k, n = 1024, 8 * 37
    weight, dense = weight_of_bytes(k, n, 128, asym=True, device="cuda")
    x, residual, bias = random_x(m, k, dtype), random_x(m, n, dtype), random_x(n, 1, dtype)[:, 0].contiguous()
    full = x.double() @ dense + bias.double()
    y = gemm.gemm(x, weight, bias=bias, residual=residual, same_bits=same_bits)
    assert error(y, full + residual.double()) < ERROR[dtype]
    in_place = residual.clone()
    gemm.gemm(x, weight, in_place, bias=bias, residual=in_place, same_bits=same_bits)
    assert torch.equal(in_place, y)
    expected = functional.silu(full) * residual.double()
    y = gemm.gemm(x, weight, bias=bias, silu_times=residual, same_bits=same_bits)
    assert error(y, expected) < 1.6 * ERROR[dtype]
    in_place = residual.clone()
    gemm.gemm(x, weight, in_place, bias=bias, silu_times=in_place, same_bits=same_bits)
    assert torch.equal(in_place, y)
    wide = torch.full((m + 2, n + 13), 7.0, dtype=dtype, device="cuda")
    gemm.gemm(x, weight, wide[1:-1, 5 : n + 5], bias=bias, silu_times=residual, same_bits=same_bits)
    assert torch.equal(wide[1:-1, 5 : n + 5], y)
    wide[1:-1, 5 : n + 5] = 7.0
    assert bool((wide == 7.0).all())


@pytest.mark.gpu
@needs_gpu
@DTYPES
@pytest.mark.parametrize(("k", "group_size"), [(6656, 128), (13824, 32), (28672, -1)])
def test_a_row_does_not_depend_on_the_rows_beside_it(k: int, group_size: int, dtype: torch.dtype) -> None:
    """Sizes at which the GEMV cuts k, and blocks bring x in together; of two planes, and of four bits in float32."""
    of_four = random_weight(k, 16 * 150, group_size, asym=True, act_order=True, device="cuda")
    weight, _ = weight_of_bytes(k, 8 * 150, group_size, asym=True, act_order=True, device="cuda")
    arguments = (of_four.qweight, of_four.scales, of_four.zeros, of_four.g_idx, group_size, "cuda")
    x = random_x(130, k, dtype)
    for w in (weight, gemm.pack(*arguments)):
        alone = torch.cat([gemm.gemm(row, w) for row in x.split(1)])
        for m in (2, 8, 13, 24, 25, 40, 96, 130):
            assert torch.equal(bits(gemm.gemm(x[:m], w, same_bits=True)), bits(alone[:m])), m
            canvas = torch.full((m + 2, w.out_features + 5), 7.0, device="cuda")
            gemm.gemm(x[:m], w, canvas[1:-1, 3:-2], same_bits=True)
            assert torch.equal(bits(canvas[1:-1, 3:-2].to(dtype)), bits(alone[:m])), m
            canvas[1:-1, 3:-2] = 7.0
            assert bool((canvas == 7.0).all()), m


@pytest.mark.gpu
@needs_gpu
@DTYPES
@pytest.mark.parametrize(("k", "n"), [(1160, 264), (5120, 2560)])
def test_one_order_for_prompts(k: int, n: int, dtype: torch.dtype) -> None:
    """Small weights, whose sums are scaled, and large ones, whose operands are."""
    weight, dense = weight_of_bytes(k, n, 128, asym=True, act_order=True, device="cuda")
    x, up = random_x(700, k, dtype), random_x(700, n, dtype)
    whole, gated = gemm.gemm(x, weight, one_order=True), gemm.gemm(x, weight, silu_times=up, one_order=True)
    assert error(whole, x.double() @ dense) < ERROR[dtype]
    for m in (1, 8, 9, 64, 129, 300):
        assert torch.equal(bits(gemm.gemm(x[:m], weight, one_order=True)), bits(whole[:m])), m
        some = gemm.gemm(x[:m], weight, silu_times=up[:m], one_order=True)
        assert torch.equal(bits(some), bits(gated[:m])), m


@pytest.mark.gpu
@needs_gpu
@DTYPES
def test_cublas_gets_the_weight_in_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    k, n, m = 1160, 8 * 37, 300
    monkeypatch.setattr(gemm, "SCRATCH_BYTES", 2 * k * 8 * 7 + 100)
    weight, dense = weight_of_bytes(k, n, 128, asym=True, act_order=True, device="cuda")
    assert weight.perm is not None
    assert torch.equal(probes.dequantize(weight, dtype), dense[weight.perm.long()].t().to(dtype))
    x, bias, residual = random_x(m, k, dtype), random_x(n, 1, dtype)[:, 0].contiguous(), random_x(m, n, dtype)
    for its_bias, its_residual in itertools.product((None, bias), (None, residual)):
        y = torch.full((m, n), torch.nan, dtype=dtype, device="cuda")
        gemm._by_cublas(x, weight, y, its_bias, its_residual, silu_mul=False)
        expected = x.double() @ dense + (0 if its_bias is None else bias.double())
        found = error(y, expected + (0 if its_residual is None else residual.double()))
        assert found < 1.6 * ERROR[dtype]  # the weight is rounded as well
    y = residual.clone()
    gemm._by_cublas(x, weight, y, bias, y, silu_mul=True)
    expected = functional.silu(x.double() @ dense + bias.double()) * residual.double()
    assert error(y, expected) < 1.6 * ERROR[dtype]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("same_bits", [False, True], ids=["", "same bits"])
def test_linears(same_bits: bool) -> None:
    """Gate and up; a head whose size is no multiple of a strip's, in a graph."""
    dtype, m = torch.float16, 100
    ws = [weight_of_bytes(512, 264, 128, asym=True, device="cuda") for _ in range(2)]
    gate, up = (PackedGPTQLinear(w, None, sorted_by_producer=False, same_bits=same_bits) for w, _ in ws)
    both, x = PackedGateUp(gate, up), random_x(m, 512, dtype) / 8
    expected = functional.silu(x.double() @ ws[0][1]) * (x.double() @ ws[1][1])
    y = both.forward(x, silu_mul=True)
    assert error(y, expected) < 1e-3
    assert torch.equal(both.forward(x, silu_mul=True, residual=y), y + y)
    assert torch.equal(both.forward(x), torch.cat((gate.forward(x), up.forward(x)), 1))
    out = torch.empty_like(y)
    assert both.forward(x, out, silu_mul=True) is out and torch.equal(out, y)
    for some in (1, 8):
        assert torch.equal(both.forward(x[:some], silu_mul=True), both.forward(x[:8], silu_mul=True)[:some])

    weight = (torch.randn(1001, 512, device="cuda") / 20).to(dtype)
    packed_head = planes.pack_head(weight, "cuda")
    head, dense = PackedHead(packed_head, None, 1001), probes.emulate(packed_head)[:, :1001].cuda()
    alone = torch.cat([head.logits(row, torch.empty(1, 1001, device="cuda")) for row in x.split(1)])
    assert error(alone, x.double() @ dense) < FLOAT_ERROR[dtype]
    assert error(alone, x.double() @ weight.double().t()) < 1.2e-2
    for m in (2, 8, 24, 25, 100):
        logits = torch.full((m, 1001), torch.nan, device="cuda")
        assert torch.equal(head.logits(x[:m], logits), alone[:m])
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            head.logits(x[:m], logits)
        logits.fill_(torch.nan)
        graph.replay()
        assert torch.equal(logits, alone[:m])
