"""The cards that GPTQ models live on: what `tools/roofline.py` and the tests of budgets know of them.

SMs, clocks, memory and nominal bandwidth are those of NVIDIA's data sheets and white papers (boost clocks; of H100 and
H200 the clock that benchmarks/results records), as are tensor rates: dense 16-bit products with float32 sums, which
GeForce cards do at half the rate of the others.
"""

from __future__ import annotations

from dataclasses import dataclass

READ_SHARE = {"HBM3": 0.97, "HBM2e": 0.86, "HBM3e, two dies": 0.90, "GDDR": 0.93}
"""kind of memory -> share of the nominal bandwidth that a kernel reaches which only reads. HBM3 was measured on an H200
(4.69 of 4.8 TB/s), and an H100 agrees; the others are what owners of such cards report of their copies: 1.75 TB/s on an
A100 of 80 GB, 0.94 on an RTX 4090, 7.2 on a B200."""


@dataclass(frozen=True)
class Card:
    name: str
    capability: int
    code: int
    """the architecture whose kernels it runs, 10 * major + minor"""
    sms: int
    ghz: float
    memory_gb: int
    tb_s: float
    """nominal bandwidth"""
    memory: str
    """a key of READ_SHARE"""
    tflops: float
    """dense, in 16 bits with float32 sums: of mma.sync, and of wgmma where the code is that of 9.0"""
    called: str
    """what CUDA calls it, and so the results of benchmarks/decode.py"""

    @property
    def read_tb_s(self) -> float:
        return self.tb_s * READ_SHARE[self.memory]

    @property
    def reached_tflops(self) -> float:
        """What a kernel may reach of `tflops`: wgmma's share was measured on an H200; those of mma.sync are estimates,
        less where tensor cores are fast beside the rest of an SM."""
        if self.code == 90:
            return 0.77 * self.tflops
        return (0.85 if "GeForce" in self.called else 0.65) * self.tflops


CARDS = (
    Card("RTX 3090", 86, 80, 82, 1.695, 24, 0.936, "GDDR", 71, "NVIDIA GeForce RTX 3090"),
    Card("A10", 86, 80, 72, 1.695, 24, 0.600, "GDDR", 125, "NVIDIA A10"),
    Card("A40", 86, 80, 84, 1.740, 48, 0.696, "GDDR", 150, "NVIDIA A40"),
    Card("A100 40 GB", 80, 80, 108, 1.410, 40, 1.555, "HBM2e", 312, "NVIDIA A100-SXM4-40GB"),
    Card("A100 80 GB", 80, 80, 108, 1.410, 80, 2.039, "HBM2e", 312, "NVIDIA A100-SXM4-80GB"),
    Card("RTX 4090", 89, 80, 128, 2.520, 24, 1.008, "GDDR", 165, "NVIDIA GeForce RTX 4090"),
    Card("L4", 89, 80, 58, 2.040, 24, 0.300, "GDDR", 121, "NVIDIA L4"),
    Card("L40S", 89, 80, 142, 2.520, 48, 0.864, "GDDR", 362, "NVIDIA L40S"),
    Card("RTX 6000 Ada", 89, 80, 142, 2.505, 48, 0.960, "GDDR", 364, "NVIDIA RTX 6000 Ada Generation"),
    Card("RTX 5090", 120, 120, 170, 2.407, 32, 1.792, "GDDR", 210, "NVIDIA GeForce RTX 5090"),
    Card("H100 PCIe", 90, 90, 114, 1.755, 80, 2.000, "HBM3", 756, "NVIDIA H100 PCIe"),
    Card("H100", 90, 90, 132, 1.980, 80, 3.350, "HBM3", 989, "NVIDIA H100 80GB HBM3"),
    Card("H200", 90, 90, 132, 1.980, 141, 4.800, "HBM3", 989, "NVIDIA H200"),
    Card("H200 as 8.0", 90, 80, 132, 1.980, 141, 4.800, "HBM3", 620, "NVIDIA H200 sm80"),
    Card("H100 as 8.0", 90, 80, 132, 1.980, 80, 3.350, "HBM3", 620, "NVIDIA H100 80GB HBM3 sm80"),
    Card("B200", 100, 100, 148, 1.965, 180, 8.000, "HBM3e, two dies", 740, "NVIDIA B200"),
)
"""The rate of mma.sync on an H200 is measured (docs/kernels-diary.md: 630 TFLOP/s alone); a B200's has it for each
SM and clock, and is an estimate."""


def find(name: str) -> Card:
    """Whatever the spaces, the case and the maker. ValueError with all names for a card that is not in the table."""

    def plain(text: str) -> str:
        letters = text.lower().replace("nvidia", "").replace("geforce", "")
        return "".join(letter for letter in letters if letter.isalnum() or letter == ".").removesuffix("gb")

    wanted = plain(name)
    for card in CARDS:
        if wanted in (plain(card.name), plain(card.called)):
            return card
    raise ValueError(f"card {name!r} is not in the table; it has {', '.join(card.name for card in CARDS)}")
