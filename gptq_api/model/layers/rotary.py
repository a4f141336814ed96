"""Rotary position embedding (RoFormer, arXiv:2104.09864) with the scalings of LLaMA's descendants, in float32.

Everything is a function of the position alone. Dynamic NTK scaling, which its inventors recompute as a sequence
grows, is fixed at the longest length served: keys already in the cache would otherwise disagree with new ones, and
the text with its neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3"]


@dataclass(frozen=True)
class RopeParameters:
    """The `rope_parameters` of a config, defaults filled in. Lengths are in tokens."""

    theta: float = 10000.0
    rope_type: RopeType = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """yarn: what cos and sin are multiplied with; None: from factor, mscale and mscale_all_dim"""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """yarn: whether the correction range is rounded to whole dimensions"""


class Rotary:
    """cos and sin for positions. One object serves every layer."""

    def __init__(self, parameters: RopeParameters, head_dim: int, max_model_len: int, device: torch.device) -> None:
        frequencies, self.scale = inverse_frequencies(parameters, head_dim, max_model_len)
        self.frequencies = frequencies.to(device)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [M] -> (cos, sin), float32 [M, 1, head_dim]. The first half of sin is negated: see
        `rotate`."""
        angles = positions.to(torch.float32).unsqueeze(1) * self.frequencies
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)

    def cos_sin(self, num_positions: int) -> Tensor:
        """float32 [num_positions, head_dim]: half a row of cosines, then the sines as they are."""
        angles = torch.arange(num_positions, device=self.frequencies.device).unsqueeze(1) * self.frequencies
        return torch.cat((angles.cos(), angles.sin()), -1) * self.scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """float32 [M, heads, head_dim] rotated; LLaMA pairs dimension i with i + head_dim / 2, so a roll brings the
    partner."""
    partner = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, partner, sin)


def inverse_frequencies(parameters: RopeParameters, head_dim: int, max_model_len: int) -> tuple[Tensor, float]:
    """(float32 [head_dim / 2], factor on cos and sin)."""
    p = parameters
    theta = p.theta
    if p.rope_type == "dynamic" and max_model_len > p.original_max_position_embeddings:
        growth = p.factor * max_model_len / p.original_max_position_embeddings - (p.factor - 1)
        theta *= growth ** (head_dim / (head_dim - 2))
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if p.rope_type == "linear":
        return plain / p.factor, 1.0
    if p.rope_type == "llama3":
        return _llama3(plain, p), 1.0
    if p.rope_type == "yarn":
        return _yarn(plain, p, head_dim), _yarn_attention_factor(p)
    return plain, 1.0


def _llama3(plain: Tensor, p: RopeParameters) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between blended (Llama 3.1 model card)."""
    turns = p.original_max_position_embeddings * plain / (2 * math.pi)
    blend = (turns - p.low_freq_factor) / (p.high_freq_factor - p.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * plain / p.factor + blend * plain


def _yarn(plain: Tensor, p: RopeParameters, head_dim: int) -> Tensor:
    """NTK-by-parts interpolation (YaRN, arXiv:2309.00071, section 3.2)."""

    def dimension(turns: float) -> float:
        """The dimension that makes this many turns over the original length."""
        return head_dim * math.log(p.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(p.theta))

    low, high = dimension(p.beta_fast), dimension(p.beta_slow)
    if p.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / p.factor * ramp + plain * (1 - ramp)


def _yarn_attention_factor(p: RopeParameters) -> float:
    """YaRN section 3.4: 0.1 ln(factor) + 1, unless the config gives the factor or DeepSeek's pair of mscales."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(p.factor) + 1.0 if p.factor > 1 else 1.0

    if p.attention_factor is not None:
        return p.attention_factor
    if p.mscale and p.mscale_all_dim:
        return scale(p.mscale) / scale(p.mscale_all_dim)
    return scale(1.0)
