"""All tests of `make test`: `python -m tests [arguments for pytest]`.

First in as many processes as there are cores, up to four: one takes a gigabyte, with the servers it starts. A file's
tests stay together, so that its servers are started once. Then, one by one, those that others on the same cores would
spoil (marker `alone`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

INTERRUPTED, NOTHING_CHOSEN = 2, 5  # exit statuses of pytest


def main(arguments: Sequence[str]) -> int:
    """The exit status: pytest's own, of the first of both runs that did not pass. Where `arguments` choose by markers
    (`-m`), there is one run, of what they choose."""
    processes = min(len(os.sched_getaffinity(0)), 4)
    runs = [["-m", "not attack and not compiles and not alone", "-n", str(processes), "--dist", "loadfile"]]
    if not any(word.startswith("-m") for word in arguments):
        runs.append(["-m", "alone and not attack and not compiles"])
    statuses = list[int]()
    for run in runs:
        statuses.append(pytest(*run, *arguments))
        if statuses[-1] == INTERRUPTED:
            break
    failed = [status for status in statuses if status not in (0, NOTHING_CHOSEN)]
    return failed[0] if failed else min(statuses)


def pytest(*arguments: str) -> int:
    """Its exit status. ^C is for pytest, which says how far it came."""
    with subprocess.Popen([sys.executable, "-m", "pytest", *arguments]) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
