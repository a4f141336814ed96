"""Zero points as stored: which version they show, what they look like, and the float ones of March 2023."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gptq_api.checkpoint.packing import ZeroVersion, pack_qzeros, unpack_qzeros, values_per_unit

_SAMPLE_WORDS = 4096
_SHOWING = 256
"""zero points that it takes to show anything"""
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


class Evidence:
    """What the zero points of all modules say about their version, module by module taken in."""

    def __init__(self) -> None:
        self._alike: dict[ZeroVersion, int] = {1: 0, 2: 0}
        """zero points of modules that have the symmetric value of a version and no other"""
        self._mixed: dict[int, int] = {}
        """bits -> zero points of the other modules"""
        self._counts: dict[tuple[int, ZeroVersion], Tensor] = {}
        """(bits, read as) -> how often each of those occurs, of a sample"""

    def add(self, qzeros: Tensor, bits: int, shown: ZeroVersion | None) -> None:
        """One module's; `shown` is what `sniff_zero_version` says of it."""
        num = qzeros.numel() * 32 // bits
        if shown is not None:
            self._alike[shown] += num
            return
        self._mixed[bits] = self._mixed.get(bits, 0) + num
        versions: tuple[ZeroVersion, ...] = (1, 2)
        for version in versions:
            found = histogram(qzeros, bits, version)
            known = self._counts.get((bits, version))
            self._counts[bits, version] = found if known is None else known + found

    @property
    def unanimous(self) -> ZeroVersion | None:
        """The version that every zero point of the checkpoint has the symmetric value of. A few that happen to be alike
        show nothing."""
        if self._mixed:
            return None
        version = self._most_alike
        return version if self._alike[version] >= _SHOWING and not self._alike[other(version)] else None

    @property
    def likelier(self) -> ZeroVersion:
        """By the number of zero points that speak for it: those that are symmetric by it, and those whose mean it puts
        in the middle while the other does not. v1 where nothing speaks."""
        votes = dict(self._alike)
        for bits, num in self._mixed.items():
            for version in votes:
                if self._statistics(bits, other(version)).suggests == version:
                    votes[version] += num
        return 2 if votes[2] > votes[1] else 1

    def complaints(self, version: ZeroVersion) -> list[str]:
        """Sentences about zero points that look like nothing when read as `version`."""
        found = (self._statistics(bits, version).complaint() for bits in sorted(self._mixed))
        return [text for text in found if text is not None]

    @property
    def _most_alike(self) -> ZeroVersion:
        return 2 if self._alike[2] > self._alike[1] else 1

    def _statistics(self, bits: int, version: ZeroVersion) -> ZeroStatistics:
        return ZeroStatistics(bits, version, self._counts[bits, version])


def other(version: ZeroVersion) -> ZeroVersion:
    return 2 if version == 1 else 1


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

    @property
    def _middle(self) -> float:
        return ((1 << self.bits) - 1) / 2

    @property
    def strange(self) -> bool:
        """Whether they are not what asymmetric quantization gives: weights are about as often negative as positive, so
        zero points lie around the middle, (2**bits - 1) / 2, and the wrong version moves them by one. With 8 bits, that
        does not show."""
        return self.bits != 8 and int(self.counts.sum()) >= _SHOWING and abs(self.mean - self._middle) > 0.6

    @property
    def suggests(self) -> ZeroVersion | None:
        """The other version, where these are strange and it would not be."""
        # v1 adds one to what is stored: a v2 file read as v1 lies too high, a v1 file read as v2 too low.
        step = -1 if self.version == 1 else 1
        fits = self.strange and abs(self.mean - self._middle + step) < 0.45
        return other(self.version) if fits else None

    def complaint(self) -> str | None:
        """A sentence where they are strange, with the other version where that explains it."""
        if not self.strange:
            return None
        middle = self._middle
        text = (
            f"{self.bits}-bit zero points read as v{self.version} are mostly {self.mode} and {self.mean:.1f} on average"
        )
        if (better := self.suggests) is not None:
            form = "gptq_v2" if better == 2 else "gptq"
            return (
                f"{text}, where v{better} would give the usual {middle:g}; if answers are nonsense, set "
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
