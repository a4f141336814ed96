"""Tests in several processes take turns: a lock belongs to an open file, so threads show what processes do."""

from __future__ import annotations

import fcntl
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.turns import turn


def test_one_that_is_alone_meets_nobody(tmp_path: Path) -> None:
    inside, met, lock = [0], set[tuple[bool, int]](), threading.Lock()

    def take(number: int) -> None:
        alone = number % 5 == 0
        with turn(tmp_path, alone):
            with lock:
                inside[0] += 1
                met.add((alone, inside[0]))
            threading.Event().wait(0.001)
            with lock:
                inside[0] -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(take, range(100)))
    assert {number for alone, number in met if alone} == {1}
    assert max(number for alone, number in met if not alone) > 1


def test_one_that_waits_to_be_alone_is_not_overtaken(tmp_path: Path) -> None:
    order, asked = list[str](), threading.Barrier(2)

    def alone() -> None:
        asked.wait()
        with turn(tmp_path, alone=True):
            order.append("alone")

    def later() -> None:
        with turn(tmp_path, alone=False):
            order.append("later")

    with turn(tmp_path, alone=False):
        first = threading.Thread(target=alone)
        first.start()
        asked.wait()
        while _is_free(tmp_path / "gate"):
            pass
        second = threading.Thread(target=later)
        second.start()
        order.append("first")
    first.join()
    second.join()
    assert order == ["first", "alone", "later"]


def _is_free(gate: Path) -> bool:
    """Whether nobody waits to be alone."""
    with gate.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(file, fcntl.LOCK_UN)
        return True
