"""How many connections there may be. A process that has no descriptor left can neither accept nor read a file, and
asyncio's loop then accepts in vain over and over, and says so every time."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import sys
import time
from typing import Any

import structlog

log = structlog.get_logger()

AT_ONCE = 32
"""connections that are accepted in one turn of the event loop, before anyone counts them"""
RESERVED = 128
"""descriptors that are not for connections: files, child processes, what is accepted only to be turned away"""
TOLD_EVERY_S = 1.0


def max_connections() -> int:
    """As many as there may be descriptors, less those that are open now and those that are reserved; at least one."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(1, limit - len(os.listdir("/dev/fd")) - RESERVED)


class Crowd:
    """Counts those that were turned away, and says so now and then."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._num = 0
        self._told_at = -TOLD_EVERY_S

    def turned_away(self) -> None:
        self._num += 1
        now = time.monotonic()
        if now - self._told_at >= TOLD_EVERY_S:
            log.warning(
                f"{self._num} connections turned away: {self.most} are open, the most that the limit of open files "
                "(ulimit -n) allows"
            )
            self._num, self._told_at = 0, now

    def on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """For the loop's set_exception_handler: descriptors that ran out all the same, as the whole machine's may."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE) and "socket" in context):
            return loop.default_exception_handler(context)
        now = time.monotonic()
        if now - self._told_at >= TOLD_EVERY_S:
            log.error(f"no connection can be accepted: {error.strerror}")
            self._told_at = now
        return None
