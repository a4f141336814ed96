"""The packed layout on the CPU: fragments read back the way a warp reads them, against the float64 weight."""

from __future__ import annotations

import pytest
import torch

from gptq_api.kernels import gemm
from gptq_api.kernels.layout import PackedLinear, chunk_bytes, sort_groups
from gptq_api.kernels.probes import emulate
from tests.support.cuda_weights import random_weight


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act-order"])
@pytest.mark.parametrize(("k", "n"), [(256, 48), (328, 16), (640, 32)])
def test_packed_weight_reads_back_exactly(k: int, n: int, group_size: int, asym: bool, act_order: bool) -> None:
    w = random_weight(k, n, group_size, asym=asym, act_order=act_order)
    packed = gemm.pack(w.qweight, w.scales, w.zeros, w.g_idx, group_size, "cpu", paired=n % 32 == 0)
    assert packed.data.shape == (n // 16, -(-k // 128), chunk_bytes(group_size, asym))
    assert torch.equal(emulate(packed), w.dense)


def test_padding_of_k_weighs_nothing() -> None:
    w = random_weight(136, 16, 128, asym=True, act_order=False)
    packed = gemm.pack(w.qweight, w.scales, w.zeros.clamp(max=15) if w.zeros is not None else None, None, 128, "cpu")
    padded = PackedLinear(packed.data, 256, 16, 128, True, None, False)
    assert torch.count_nonzero(emulate(padded)[136:]) == 0


def test_chunks_are_what_the_header_says() -> None:
    sizes = {(128, False): 1056, (128, True): 1072, (64, False): 1088, (32, False): 1152, (32, True): 1216}
    assert {key: chunk_bytes(*key) for key in sizes} == sizes


def test_zero_points_that_are_all_eight_are_dropped() -> None:
    w = random_weight(128, 16, 128, asym=False, act_order=False)
    eights = torch.full((1, 16), 8, dtype=torch.uint8)
    assert not gemm.pack(w.qweight, w.scales, eights, None, 128, "cpu").has_zeros


def test_sorted_groups_need_no_permutation_and_ragged_ones_are_refused() -> None:
    assert sort_groups(torch.arange(256) // 128, 128) is None
    assert sort_groups(torch.arange(200) // 128, 128) is None
    with pytest.raises(ValueError, match="groups of 128 rows"):
        sort_groups(torch.tensor([0] * 100 + [1] * 156), 128)


@pytest.mark.parametrize(
    ("bits", "k", "n", "group_size", "said"),
    [
        (3, 128, 16, 128, "3 bits"),
        (4, 128, 24, 128, "24 output"),
        (4, 132, 16, -1, "132 input"),
        (4, 128, 16, 48, "48"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(bits: int, k: int, n: int, group_size: int, said: str) -> None:
    assert said in str(gemm.refusal(bits, k, n, group_size))


def test_a_scale_beyond_float16_is_refused() -> None:
    w = random_weight(128, 16, 128, asym=False, act_order=False)
    with pytest.raises(ValueError, match="finite in float16"):
        gemm.pack(w.qweight, w.scales.float() * 1e8, None, None, 128, "cpu")


def test_activations_are_checked_before_any_address_is_taken() -> None:
    w = random_weight(128, 32, 128, asym=False, act_order=False)
    packed = gemm.pack(w.qweight, w.scales, None, None, 128, "cpu")
    with pytest.raises(ValueError, match="float32"):
        gemm.gemm(torch.zeros(1, 128), packed)
    with pytest.raises(ValueError, match=r"expected \[M, 128\]"):
        gemm.gemm(torch.zeros(1, 64, dtype=torch.float16), packed)
    with pytest.raises(ValueError, match="paired"):
        gemm.gemm(torch.zeros(1, 128, dtype=torch.float16), packed, silu_mul=True)
    with pytest.raises(ValueError, match="bias"):
        gemm.gemm(torch.zeros(1, 128, dtype=torch.float16), packed, bias=torch.zeros(16, dtype=torch.float16))
