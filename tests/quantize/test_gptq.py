"""The quantizer against its own definition, written here column by column, and against rounding to nearest."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gptq_api.checkpoint.packing import pack_qweight, pack_qzeros, unpack_qweight, unpack_qzeros
from gptq_api.quantize.gptq import (
    Hessian,
    QuantizedLinear,
    QuantizeError,
    QuantizeOptions,
    factorize,
    quantize,
    round_to_nearest,
)


def layer(num_outputs: int = 32, num_inputs: int = 256, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [N, K] and correlated inputs [2048, K], channels of very different size, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_outputs, num_inputs, generator=generator, dtype=torch.float64) * 0.05
    mix = torch.randn(num_inputs, num_inputs, generator=generator, dtype=torch.float64) / num_inputs**0.5
    sizes = torch.rand(num_inputs, generator=generator, dtype=torch.float64) ** 3 + 0.05
    inputs = torch.randn(2048, num_inputs, generator=generator, dtype=torch.float64) @ mix * sizes
    return weight, inputs


def hessian_of(inputs: Tensor) -> Tensor:
    return 2 / len(inputs) * inputs.T @ inputs


def output_error(weight: Tensor, result: QuantizedLinear, inputs: Tensor) -> float:
    return float((inputs @ (weight - result.dequantize().to(weight)).T).square().mean())


def naive(
    weight: Tensor, hessian: Tensor, settings: QuantizeOptions
) -> tuple[dict[tuple[int, int], int], dict[int, int]]:
    """Optimal brain surgeon, one weight at a time and without Cholesky: quantize the next column, spread its error by
    the inverse Hessian of the columns that are left, strike it out of that inverse.

    -> {(n, k): integer}, {k: group}
    """
    num_outputs, num_inputs = weight.shape
    maxq = 2**settings.bits - 1
    size = num_inputs if settings.group_size == -1 else settings.group_size
    hessian = hessian.clone()
    weight = weight.clone()
    order = list(range(num_inputs))

    def fit(values: list[float]) -> tuple[float, float]:
        low, high = min(0.0, *values), max(0.0, *values)
        if settings.sym:
            high = max(-low, high)
            low = -high if low < 0 else low
        if low == 0 and high == 0:
            low, high = -1.0, 1.0
        scale = (high - low) / maxq
        return scale, (maxq + 1) / 2 if settings.sym else float(round(-low / scale))

    whole = [fit(weight[n].tolist()) for n in range(num_outputs)]
    for k in range(num_inputs):
        if hessian[k, k] == 0:
            hessian[k, k] = 1
            weight[:, k] = 0
    original = weight.clone()
    if settings.desc_act:
        order.sort(key=lambda k: -float(hessian[k, k]))
    elif settings.act_group_aware:
        groups = [order[start : start + size] for start in range(0, num_inputs, size)]
        groups.sort(key=lambda group: -float(torch.stack([hessian[k, k] for k in group]).mean()))
        order = [k for group in groups for k in sorted(group, key=lambda k: -float(hessian[k, k]))]
    hessian += settings.damp_percent * hessian.diagonal().mean() * torch.eye(num_inputs, dtype=hessian.dtype)
    inverse = torch.linalg.inv(hessian)
    seen_by_groups = weight.clone()  # groups are fitted to what the columns were when the block of 128 began
    params: list[tuple[float, float]] = []
    integers: dict[tuple[int, int], int] = {}
    group_of: dict[int, int] = {}
    members = [
        k // size if settings.static_groups or settings.act_group_aware else c // size for c, k in enumerate(order)
    ]
    for c, k in enumerate(order):
        if c % 128 == 0:
            seen_by_groups = weight.clone()
        group = members[c]
        for n in range(num_outputs):
            if settings.group_size == -1:
                scale, zero = whole[n]
            elif settings.static_groups:
                scale, zero = fit(original[n, group * size : (group + 1) * size].tolist())
            else:
                if c == 0 or members[c - 1] != group:
                    params = params if n else []
                    mine = [j for j, its in zip(order, members, strict=True) if its == group]
                    params.append(fit([float(seen_by_groups[n, j]) for j in mine]))
                scale, zero = params[n]
            value = float(weight[n, k])
            integers[n, k] = int(min(max(round(value / scale) + zero, 0), maxq))
            error = (value - scale * (integers[n, k] - zero)) / float(inverse[k, k])
            weight[n] -= error * inverse[k]
        group_of[k] = group
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
        inverse[k, :] = 0
        inverse[:, k] = 0
    return integers, group_of


@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "desc_act", "static_groups"),
    [
        (4, 32, True, True, False),
        (4, 32, False, True, False),
        (4, 64, False, False, False),
        (3, 48, False, True, False),
        (4, -1, True, True, False),
        (4, -1, False, False, False),
        (2, 32, False, True, True),
        (8, 128, True, False, False),
        (4, 100, True, True, False),
    ],
)
def test_same_integers_as_the_definition(
    bits: int, group_size: int, sym: bool, desc_act: bool, static_groups: bool
) -> None:
    weight, inputs = layer(num_outputs=4, num_inputs=160, seed=bits)
    inputs[:, [5, 77]] = 0
    settings = QuantizeOptions(bits, group_size, sym, desc_act, static_groups)  # type: ignore[arg-type]
    hessian = hessian_of(inputs)
    result = quantize(weight, factorize(hessian, settings), settings)
    integers, group_of = naive(weight, hessian, settings)
    expected = torch.tensor([[integers[n, k] for n in range(4)] for k in range(160)], dtype=torch.uint8)
    assert torch.equal(result.q, expected)
    assert result.g_idx.tolist() == [group_of[k] for k in range(160)]
    assert result.scales.shape == result.zeros.shape == (settings.num_groups(160), 4)


@pytest.mark.parametrize(
    ("bits", "group_size", "sym"), [(4, 32, True), (3, 48, False), (2, 100, True), (4, 128, False)]
)
def test_group_aware_is_another_order_of_the_same_groups(bits: int, group_size: int, sym: bool) -> None:
    """48, 100 and 128 leave a last group that is smaller; that of 48 comes first in the order."""
    weight, inputs = layer(num_outputs=4, num_inputs=160, seed=bits)
    inputs[:, [5, 77]] = 0
    settings = QuantizeOptions(bits, group_size, sym, act_group_aware=True)  # type: ignore[arg-type]
    hessian = hessian_of(inputs)
    result = quantize(weight, factorize(hessian, settings), settings)
    integers, group_of = naive(weight, hessian, settings)
    expected = torch.tensor([[integers[n, k] for n in range(4)] for k in range(160)], dtype=torch.uint8)
    assert torch.equal(result.q, expected)
    assert result.g_idx.tolist() == [group_of[k] for k in range(160)] == [k // group_size for k in range(160)]
    assert result.scales.shape == result.zeros.shape == (settings.num_groups(160), 4)


def test_group_aware_helps() -> None:
    errors = []
    for seed in range(4):
        weight, inputs = layer(seed=seed)
        pair = [QuantizeOptions(3, 32, act_group_aware=aware) for aware in (False, True)]
        errors.append(
            [output_error(weight, quantize(weight, factorize(hessian_of(inputs), s), s), inputs) for s in pair]
        )
    assert all(aware < plain for plain, aware in errors)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_better_than_rounding(bits: int, sym: bool) -> None:
    weight, inputs = layer()
    hessian = hessian_of(inputs)
    for group_size, desc_act in itertools.product((-1, 32, 128), (False, True)):
        settings = QuantizeOptions(bits, group_size, sym, desc_act)  # type: ignore[arg-type]
        gptq = output_error(weight, quantize(weight, factorize(hessian, settings), settings), inputs)
        nearest = output_error(weight, round_to_nearest(weight, settings), inputs)
        # With 2 bits much of what is passed on is clipped away again; act-order still has to gain.
        if bits > 2 or desc_act:
            assert gptq < 0.75 * nearest, (group_size, desc_act)


def test_act_order_helps_and_scrambles_only_the_groups() -> None:
    weight, inputs = layer()
    hessian = hessian_of(inputs)
    errors = []
    for desc_act in (False, True):
        settings = QuantizeOptions(3, 32, sym=False, desc_act=desc_act)
        result = quantize(weight, factorize(hessian, settings), settings)
        errors.append(output_error(weight, result, inputs))
        assert sorted(result.g_idx.tolist()) == [k // 32 for k in range(256)]
        assert (result.g_idx.tolist() == [k // 32 for k in range(256)]) is not desc_act
    assert errors[1] < errors[0]
    largest_first = torch.argsort(hessian.diagonal(), descending=True)
    assert result.g_idx[largest_first].tolist() == [k // 32 for k in range(256)]


def test_no_weight_is_further_off_than_its_neighbours_allow() -> None:
    """Without correlation GPTQ is rounding: every weight within half a step, so scales, zeros and g_idx fit q."""
    weight, _ = layer()
    for sym, desc_act in itertools.product((True, False), repeat=2):
        settings = QuantizeOptions(4, 32, sym, desc_act)
        diagonal = torch.diag(torch.linspace(1, 2, 256, dtype=torch.float64))
        result = quantize(weight, factorize(diagonal, settings), settings)
        off = (weight - result.dequantize()).abs()
        half = result.scales[result.g_idx.long()].T / 2
        # An asymmetric range is shifted by up to half a step to put 0 on the grid, a symmetric one lacks its last step.
        assert (off <= half * 2.0001).all()
        assert (off <= half * 1.0001).double().mean() > 0.95
        if sym:
            assert (result.zeros == 8).all()
        nearest = round_to_nearest(weight, settings)
        if not desc_act:
            assert torch.equal(result.q, nearest.q) and torch.equal(result.scales, nearest.scales)


def test_packs_and_comes_back() -> None:
    weight, inputs = layer()
    for bits in (2, 3, 4, 8):
        settings = QuantizeOptions(bits, 64, sym=False, desc_act=True)
        result = quantize(weight.float(), factorize(hessian_of(inputs).float(), settings), settings)
        assert torch.equal(unpack_qweight(pack_qweight(result.q, bits), bits), result.q)
        assert torch.equal(unpack_qzeros(pack_qzeros(result.zeros, bits), bits), result.zeros)


def test_channels_without_input_become_zero() -> None:
    weight, inputs = layer()
    inputs[:, 10:20] = 0
    settings = QuantizeOptions(4, 32, sym=False, desc_act=True)
    result = quantize(weight, factorize(hessian_of(inputs), settings), settings)
    assert (result.dequantize()[:, 10:20] == 0).all()


def test_damping_rises_until_the_hessian_can_be_inverted() -> None:
    inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).repeat(1, 4)  # rank 4 of 256
    settings = QuantizeOptions(damp_percent=1e-9)
    factor = factorize(hessian_of(inputs), settings)
    assert factor.damp_percent > settings.damp_percent
    weight, _ = layer()
    assert torch.isfinite(quantize(weight.float(), factor, settings).scales).all()
    with pytest.raises(QuantizeError, match="not positive definite"):
        factorize(-torch.eye(8) * 5, settings)
    with pytest.raises(QuantizeError, match="not finite"):
        factorize(torch.full((8, 8), torch.nan), settings)


def test_hessian_is_the_mean_over_all_rows_however_they_arrive() -> None:
    _, inputs = layer()
    hessian = Hessian(256)
    with pytest.raises(QuantizeError):
        hessian.matrix()
    for part in (inputs[:5], inputs[5:1000].reshape(5, 199, 256), inputs[1000:]):
        hessian.add(part)
    assert hessian.num_rows == 2048
    torch.testing.assert_close(hessian.matrix(), hessian_of(inputs).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"bits": 5}, {"group_size": 0}, {"damp_percent": 0.0}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        QuantizeOptions(**wrong)  # type: ignore[arg-type]


def test_weight_and_hessian_must_fit() -> None:
    weight, _ = layer()
    settings = QuantizeOptions()
    with pytest.raises(ValueError, match="256 input channels"):
        quantize(weight, factorize(torch.eye(128), settings), settings)
