"""A batch of a thousand lines and a server that is killed again and again: none lost, none doubled."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.test_batches import kill_in_the_middle


@pytest.mark.attack
@pytest.mark.timeout(600)
def test_a_thousand_lines_and_three_kills(tmp_path: Path) -> None:
    kill_in_the_middle(tmp_path / "b", 1000, 3)
