"""GPTQ: quantize the weight of one Linear so that its output on calibration inputs changes least.

The algorithm of Frantar et al. 2022 ("GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers") in the form every public tool uses, down to its quirks, so that the integers come out the same:

    hessian = Hessian(num_inputs)
    for x in calibration_inputs:
        hessian.add(x)
    factor = factorize(hessian.matrix(), settings)      # shared by Linears that read the same inputs (q/k/v, gate/up)
    result = quantize(weight, factor, settings)         # integers, scales, zero points, g_idx

It knows nothing about models, files or packing (`checkpoint.packing` has that).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gptq_api.errors import UserError

BLOCK = 128
"""columns whose error is spread at once; it shows in the result where groups are smaller, see `quantize`"""
MAX_DAMP = 1.0


class QuantizeError(UserError):
    """The Hessian cannot be factorised, or holds values that are not finite."""


@dataclass(frozen=True)
class QuantizeOptions:
    """How weights are quantized. The names are those of quantize_config.json."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int = 128
    """input channels that share a scale and a zero point; -1: all of them. The last group may be smaller."""
    sym: bool = True
    """zero point in the middle of the range instead of fitted"""
    desc_act: bool = False
    """act-order: channels with the largest mean square input first"""
    static_groups: bool = False
    """group parameters from the original weight, in the original order; with desc_act, g_idx stays sequential"""
    act_group_aware: bool = False
    """without desc_act: groups with the largest mean square input first, and in a group its channels; a matter of
    quantizing alone, what belongs to a group stays as it is (GPTQModel's default since version 5)"""
    damp_percent: float = 0.01
    """of the Hessian's mean diagonal, added to its diagonal; doubled up to 1 where that is not enough"""

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits is 2, 3, 4 or 8, not {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size is -1 (one group) or positive, not {self.group_size}")
        if not 0 < self.damp_percent <= MAX_DAMP:
            raise ValueError(f"damp_percent is above 0 and at most {MAX_DAMP}, not {self.damp_percent}")

    def num_groups(self, num_inputs: int) -> int:
        return 1 if self.group_size == -1 else -(-num_inputs // self.group_size)


@dataclass(frozen=True)
class QuantizedLinear:
    """weight[n, k] = scales[g_idx[k], n] * (q[k, n] - zeros[g_idx[k], n]), laid out for `checkpoint.packing`."""

    q: Tensor
    """uint8 [K, N], below 2**bits"""
    scales: Tensor
    """float32 [G, N] (float64 for a float64 weight), above 0"""
    zeros: Tensor
    """zero points, uint8 [G, N], below 2**bits"""
    g_idx: Tensor
    """int32 [K], the group of each input channel"""
    loss: float
    """sum of the squared errors, each weighted by its inverse Hessian entry (the paper's objective); for comparing"""

    def dequantize(self) -> Tensor:
        """[N, K], dtype of the scales."""
        groups = self.g_idx.long()
        return (self.scales[groups] * (self.q.to(self.scales.dtype) - self.zeros[groups].to(self.scales.dtype))).T


class Hessian:
    """H = 2/n X^T X over all inputs X [n, K] seen so far, float32."""

    def __init__(self, num_inputs: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(num_inputs, num_inputs, dtype=torch.float32, device=device)
        self.num_rows = 0

    def add(self, x: Tensor) -> None:
        """Inputs of the Linear, [..., K], any float dtype."""
        rows = x.reshape(-1, x.shape[-1]).to(self._sum)
        # A running mean instead of a sum: a long calibration must not outgrow float32.
        total = self.num_rows + len(rows)
        self._sum.mul_(self.num_rows / total).addmm_(rows.T, rows, alpha=2 / total)
        self.num_rows = total

    def matrix(self) -> Tensor:
        """float32 [K, K]."""
        if not self.num_rows:
            raise QuantizeError("no calibration inputs were added")
        return self._sum


@dataclass(frozen=True)
class Factor:
    """What quantizing needs of a Hessian."""

    upper: Tensor
    """[K, K]: upper Cholesky factor of the inverse of the damped Hessian, channels in the order of `perm`"""
    perm: Tensor
    """int64 [K]: channel quantized at each step"""
    dead: Tensor
    """bool [K]: channels that were 0 in all inputs; their weights become 0"""
    damp_percent: float
    """what it took"""


def factorize(hessian: Tensor, settings: QuantizeOptions) -> Factor:
    """`hessian` [K, K] -> its Factor, same dtype and device. QuantizeError where even full damping does not help."""
    if not bool(torch.isfinite(hessian).all()):
        raise QuantizeError("the Hessian holds values that are not finite: the calibration inputs overflowed")
    dead = hessian.diagonal() == 0
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[dead] = 1
    if settings.desc_act:
        perm = torch.argsort(diagonal, descending=True, stable=True)
    elif settings.act_group_aware and settings.group_size != -1:
        perm = _group_order(diagonal, settings.group_size)
    else:
        perm = torch.arange(len(hessian), device=hessian.device)
    hessian = hessian[perm][:, perm]
    mean = hessian.diagonal().mean()
    damp = settings.damp_percent
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damp * mean)
        upper = _inverse_factor(damped)
        if upper is not None:
            return Factor(upper, perm, dead, damp)
        if damp >= MAX_DAMP:
            raise QuantizeError(f"the Hessian is not positive definite, even with damp_percent {damp}")
        damp = min(2 * damp, MAX_DAMP)


def _group_order(diagonal: Tensor, group_size: int) -> Tensor:
    """[K] -> int64 [K]: groups by their mean, the channels of each by themselves, the largest first."""
    groups = diagonal.split(group_size)  # type: ignore[no-untyped-call]
    ranks = torch.argsort(torch.stack([group.mean() for group in groups]), descending=True, stable=True).tolist()
    return torch.cat([torch.argsort(groups[g], descending=True, stable=True) + g * group_size for g in ranks])


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """chol(inverse(matrix)), upper; None where `matrix` is not positive definite in its precision."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) or not bool(torch.isfinite(upper).all()) else upper


@dataclass(frozen=True)
class _Params:
    """One group: scale and zero point of each output channel, [N], float."""

    scale: Tensor
    zero: Tensor

    def round(self, column: Tensor, maxq: int) -> Tensor:
        """[N] -> integers as floats. torch.round: half to even."""
        return torch.clamp(torch.round(column / self.scale) + self.zero, 0, maxq)


def _find_params(weight: Tensor, settings: QuantizeOptions) -> _Params:
    """From the smallest and largest value of each row of `weight` [N, g]; the range always holds 0.

    With sym, a row without negative values gets the middle zero point all the same and uses half of its range: so do
    all tools.
    """
    maxq = 2**settings.bits - 1
    low = weight.amin(1).clamp(max=0)
    high = weight.amax(1).clamp(min=0)
    if settings.sym:
        high = torch.maximum(low.abs(), high)
        low = torch.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low = torch.where(empty, -1, low)
    high = torch.where(empty, 1, high)
    scale = (high - low) / maxq
    zero = torch.full_like(scale, (maxq + 1) / 2) if settings.sym else torch.round(-low / scale)
    return _Params(scale, zero)


def quantize(weight: Tensor, factor: Factor, settings: QuantizeOptions) -> QuantizedLinear:
    """GPTQ on `weight` [N, K]; float64 is computed in float64, everything else in float32, where `factor` lives.

    ValueError where the weight does not fit the factor.
    """
    upper, perm = factor.upper, factor.perm
    num_outputs, num_inputs = weight.shape
    if len(perm) != num_inputs:
        raise ValueError(f"the weight has {num_inputs} input channels and the Hessian {len(perm)}")
    w = weight.to(upper.device, torch.float64 if weight.dtype == torch.float64 else torch.float32).clone()
    upper = upper.to(w.dtype)
    maxq = 2**settings.bits - 1
    size = num_inputs if settings.group_size == -1 else settings.group_size
    # One group for all is fitted before dead channels are cleared, smaller groups after.
    whole = _find_params(w, settings)
    w[:, factor.dead] = 0
    starts = range(0, num_inputs, size)
    fixed = [whole] if settings.group_size == -1 else []
    if settings.static_groups and not fixed:
        fixed = [_find_params(w[:, start : start + size], settings) for start in starts]
    found: dict[int, _Params] = dict(enumerate(fixed))

    position = torch.arange(num_inputs, device=w.device)
    # Act-order makes groups of neighbours in its order; else, and where they are fixed, groups are those of the weight.
    moves = settings.desc_act and not fixed
    group_of = (position if moves else perm).div(size, rounding_mode="floor").tolist()
    w = w[:, perm]
    q = torch.empty(num_inputs, num_outputs, dtype=torch.uint8, device=w.device)
    loss = torch.zeros((), dtype=torch.float64, device=w.device)
    for begin in range(0, num_inputs, BLOCK):
        end = min(begin + BLOCK, num_inputs)
        block = w[:, begin:end].clone()
        errors = torch.empty_like(block)
        for i, c in enumerate(range(begin, end)):
            group = group_of[c]
            if group not in found:
                # From w and not from the block: a group that starts inside a block is fitted to columns that have not
                # seen the errors of this block yet. Every tool does so.
                length = min(size, num_inputs - group * size)
                found[group] = _find_params(w[:, c : c + length], settings)
            params = found[group]
            column = block[:, i]
            rounded = params.round(column, maxq)
            q[c] = rounded.to(torch.uint8)
            error = (column - params.scale * (rounded - params.zero)) / upper[c, c]
            block[:, i:] -= error[:, None] * upper[c, c:end]
            errors[:, i] = error
        w[:, end:] -= errors @ upper[begin:end, end:]
        loss += errors.double().square().sum() / 2

    inverse = torch.argsort(perm)
    groups = [found[group] for group in range(len(starts))]
    return QuantizedLinear(
        q=q[inverse],
        scales=torch.stack([params.scale for params in groups]),
        zeros=torch.stack([params.zero for params in groups]).to(torch.uint8),
        g_idx=((inverse if moves else position) // size).to(torch.int32),
        loss=float(loss),
    )


def round_to_nearest(weight: Tensor, settings: QuantizeOptions) -> QuantizedLinear:
    """Each weight on its own, no calibration: what GPTQ has to beat. Groups are sequential."""
    num_inputs = weight.shape[1]
    plain = Factor(
        torch.eye(num_inputs, dtype=weight.dtype if weight.dtype == torch.float64 else torch.float32).to(weight.device),
        torch.arange(num_inputs, device=weight.device),
        torch.zeros(num_inputs, dtype=torch.bool, device=weight.device),
        settings.damp_percent,
    )
    return quantize(weight, plain, settings)
