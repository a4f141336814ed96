"""Zero points as stored: which version they show, what they look like, and the float ones of March 2023."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gptq_api.checkpoint.packing import ZeroVersion, pack_qzeros, unpack_qzeros, values_per_unit

_SAMPLE_WORDS = 4096
_WHOLE = 1e-2
"""how far from a whole number a zero point may be that was multiplied with its scale in float32 or float16"""


def sniff_zero_version(qzeros: Tensor, bits: int) -> ZeroVersion | None:
    """Symmetric zeros show their version: all stored values 2**(bits-1) is v2, all one less is v1. Else None."""
    unit = values_per_unit(bits) * bits // 32
    if not qzeros.numel() or qzeros.shape[1] % unit:
        return None
    units = qzeros.reshape(-1, unit)
    versions: tuple[ZeroVersion, ...] = (1, 2)
    for version in versions:
        pattern = _symmetric_words(bits, version).to(units.device)
        # The first unit tells nearly always; only then all of them are looked at.
        if torch.equal(units[0], pattern) and bool((units == pattern).all()):
            return version
    return None


@cache
def _symmetric_words(bits: int, version: ZeroVersion) -> Tensor:
    middle = torch.full((1, values_per_unit(bits)), 1 << (bits - 1), dtype=torch.uint8)
    return pack_qzeros(middle, bits, version)[0]


def histogram(qzeros: Tensor, bits: int, version: ZeroVersion) -> Tensor:
    """How often each zero point occurs, int64 [2**bits]; of a few thousand words spread over the groups."""
    rows = max(1, _SAMPLE_WORDS // qzeros.shape[1])
    sample = qzeros[:: -(-qzeros.shape[0] // rows)]
    return torch.bincount(unpack_qzeros(sample, bits, version).flatten().to(torch.int64), minlength=1 << bits)


@dataclass(frozen=True)
class ZeroStatistics:
    """The zero points of all modules with the same bits that do not show their version."""

    bits: int
    version: ZeroVersion
    """as which they are read"""
    counts: Tensor
    """int64 [2**bits]"""

    @property
    def mean(self) -> float:
        values = torch.arange(len(self.counts), dtype=torch.float64)
        return float((self.counts * values).sum() / self.counts.sum())

    @property
    def mode(self) -> int:
        return int(self.counts.argmax())

    def complaint(self) -> str | None:
        """A sentence where they are not what asymmetric quantization gives: weights are about as often negative as
        positive, so zero points lie around the middle, (2**bits - 1) / 2, and the wrong version moves them by one.

        Nothing is said of 8 bits, where a step does not show.
        """
        middle = ((1 << self.bits) - 1) / 2
        off = self.mean - middle
        if self.bits == 8 or int(self.counts.sum()) < 256 or abs(off) <= 0.6:
            return None
        text = (
            f"{self.bits}-bit zero points read as v{self.version} are mostly {self.mode} and {self.mean:.1f} on average"
        )
        # v1 adds one to what is stored: a v2 file read as v1 lies too high, a v1 file read as v2 too low.
        other, step = (2, -1) if self.version == 1 else (1, 1)
        if abs(off + step) < 0.45:
            form = "gptq_v2" if other == 2 else "gptq"
            return (
                f"{text}, where v{other} would give the usual {middle:g}; if answers are nonsense, set "
                f'"checkpoint_format": "{form}" in quantize_config.json'
            )
        return (
            f"{text}, far from the usual {middle:g}: neither v1 nor v2 explains it; if answers are nonsense, "
            "download the checkpoint again or quantize again"
        )


def whole_zeros(zeros: Tensor, scales: Tensor, bits: int) -> Tensor | None:
    """Zero points of March 2023, stored as zero * scale, float [N, 1] both -> uint8 [1, N]; None where they are no
    whole steps between 0 and 2**bits - 1."""
    z, s = zeros.to(torch.float64), scales.to(torch.float64)
    steps = torch.where(s == 0, 0.0, z / s)
    whole = steps.round()
    fits = ((steps - whole).abs() <= _WHOLE) & (whole >= 0) & (whole < 1 << bits)
    return whole.to(torch.uint8).t().contiguous() if bool(fits.all()) else None
