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

NOTHING_CHOSEN = 5  # pytest's exit status where no test is left


def main(arguments: Sequence[str]) -> int:
    """The exit status: pytest's own, of the first of both runs that did not pass."""
    processes = min(len(os.sched_getaffinity(0)), 4)
    runs = [
        ["-m", "not attack and not compiles and not alone", "-n", str(processes), "--dist", "loadfile"],
        ["-m", "alone and not attack and not compiles"],
    ]
    statuses = [subprocess.call([sys.executable, "-m", "pytest", *run, *arguments]) for run in runs]
    failed = [status for status in statuses if status not in (0, NOTHING_CHOSEN)]
    return failed[0] if failed else min(statuses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
