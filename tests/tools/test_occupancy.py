"""tools/occupancy.py against what NVIDIA's occupancy calculator says."""

from __future__ import annotations

import pytest

from tools.occupancy import LIMITS, blocks_per_sm


@pytest.mark.parametrize(
    ("capability", "threads", "registers", "shared", "blocks"),
    [
        (80, 1024, 32, 0, 2),  # threads
        (86, 1024, 32, 0, 1),
        (80, 32, 16, 0, 32),  # blocks
        (86, 32, 16, 0, 16),
        (89, 32, 16, 0, 24),
        (80, 256, 128, 0, 2),  # registers
        (80, 256, 129, 0, 1),  # in units of 256 for a warp
        (80, 128, 255, 0, 2),
        (90, 320, 96, 0, 2),
        (90, 320, 102, 0, 1),
        (80, 128, 32, 80 << 10, 2),  # shared memory
        (86, 128, 32, 49 << 10, 2),
        (86, 128, 32, (49 << 10) + 1, 1),
        (80, 128, 32, 163 << 10, 1),
        (80, 128, 32, (163 << 10) + 1, 0),
        (89, 128, 32, 99 << 10, 1),
        (89, 128, 32, 100 << 10, 0),
        (90, 128, 32, 227 << 10, 1),
    ],
)
def test_blocks_per_sm(capability: int, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert blocks_per_sm(capability, threads, registers, shared) == blocks


def test_each_card_has_its_limits() -> None:
    from tools.cards import CARDS

    assert {card.capability for card in CARDS} | {card.code for card in CARDS} == set(LIMITS)
