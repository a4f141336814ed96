"""Which rows share a reading: as many as fit, never across the borders at which a row is cut otherwise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gptq_api.kernels import row_groups
from gptq_api.kernels.row_groups import RowGroups


def first_step_and_chunk(context: int, window: int | None) -> tuple[int, int]:
    """By the definition: 128 tokens a step, at most 32 chunks of a power of two steps."""
    first = 0 if window is None else max(0, context - window) // 128
    steps, chunk = -(-context // 128) - first, 1
    while -(-steps // chunk) > 32:
        chunk *= 2
    return first, chunk


@pytest.mark.parametrize(
    ("heads", "kv_heads", "most"),
    [(40, 40, 8), (8, 4, 4), (9, 3, 2), (32, 8, 2), (28, 4, 1), (64, 8, 1), (12, 1, 1), (20, 10, 4), (10, 2, 1)],
)
def test_as_many_rows_as_there_are_columns(heads: int, kv_heads: int, most: int) -> None:
    assert RowGroups.for_heads(heads, kv_heads, [None]).most == most


@pytest.mark.parametrize("most", [1, 2, 4, 8])
@pytest.mark.parametrize("windows", [(None,), (4096,), (None, 100), (4000, 128)])
def test_every_group_is_cut_alike(most: int, windows: tuple[int | None, ...]) -> None:
    groups = RowGroups(most, windows)
    for base in (0, 1, 90, 99, 120, 127, 128, 500, 4000, 4090, 4095, 4096, 5113, 8190, 16380, 40000):
        for rows in range(1, 9):
            contexts, ranks = [base + 1 + i for i in range(rows)], list(range(rows))
            found = groups.of([7, *contexts], [0, *ranks])[1:]
            assert groups.of_sequence(base + 1, rows) == found
            row = 0
            while row < rows:
                number, new = found[row]
                assert 1 <= number <= most and new == row + number
                assert found[row + 1 : row + number] == [(0, 0)] * (number - 1)
                for window in windows:
                    assert len({first_step_and_chunk(contexts[row + i], window) for i in range(number)}) == 1
                row += number
                if row < rows:  # it ends for a reason
                    cuts = [[first_step_and_chunk(contexts[row + i], window) for window in windows] for i in (-1, 0)]
                    assert row % most == 0 or cuts[0] != cuts[1]


def test_sequences_do_not_share() -> None:
    assert RowGroups(4).of([10, 11, 12, 13, 5], [0, 1, 0, 1, 0]) == [(2, 2), (0, 0), (2, 2), (0, 0), (1, 1)]


def test_the_numbers_are_the_kernel_s() -> None:
    ext = Path(__file__).parents[2] / "ext" / "attention"
    text = (ext / "attention_decode_schedule.cuh").read_text() + (ext / "attention_decode.h").read_text()
    values = dict(re.findall(r"constexpr int (\w+) = (\d+);", text))
    assert int(values["kMaxChunks"]) == row_groups.MAX_CHUNKS and int(values["kPartHeads"]) == row_groups.COLUMNS
    assert int(values["kMaxNewRows"]) == row_groups.MAX_NEW_ROWS
    assert int(values["kAttentionWarps"]) * int(values["kTileTokens"]) == row_groups.STEP_TOKENS
