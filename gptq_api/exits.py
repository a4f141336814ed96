"""Exit statuses of the commands. What each means to a supervisor stands in docs/operations.md."""

from __future__ import annotations

import signal

DONE = 0
"""what was asked for is done; a server was told to stop, and did"""
FAILED = 1
"""a sentence on stderr says why; trying again changes nothing unless something else does"""
WRONG_USE = 2
"""a command, flag, variable, key of the settings file or file of API keys is wrong"""
ENGINE_DEAD = 70
"""the server's engine died, as often as --restart-engine allows: start the server again"""
INTERRUPTED = 128 + signal.SIGINT
"""^C before it was done"""


def cut_short(number: int) -> int:
    """By a signal that did not wait for what was still going on; what shells say of a program that a signal ended."""
    return 128 + number
