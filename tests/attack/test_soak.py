"""Everything at once, for seconds here, for two minutes under `make attack`, for half an hour under `make soak`."""

from __future__ import annotations

import time

import pytest

from tests.attack.soak import soak


def test_fifteen_seconds() -> None:
    found = soak(15, seed=15)
    assert not found.wrong, found.wrong[:5]
    assert found.answers > 20


@pytest.mark.attack
@pytest.mark.timeout(600)
def test_two_minutes() -> None:
    found = soak(120, seed=time.time_ns())
    assert not found.wrong, found.wrong[:5]
    assert found.slope(1) < 10 and found.slope(2) < 10, (found.slope(1), found.slope(2))
