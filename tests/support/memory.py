"""What this process holds."""

from __future__ import annotations

import re
from pathlib import Path


def huge_bytes() -> int:
    """In pages of 2 MB."""
    return _bytes("AnonHugePages", Path("/proc/self/smaps_rollup"))


def most_bytes() -> int:
    """At any time until now. (getrusage counts what the parent held when it started this process.)"""
    return _bytes("VmHWM", Path("/proc/self/status"))


def forget_most() -> None:
    """`most_bytes` counts from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def _bytes(name: str, file: Path) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    assert found, f"{file} has no {name}"
    return int(found[1]) * 1024
