"""A network that has loopback alone: for programs that would rather talk to their makers."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


def alone(function: Callable[[], T]) -> T:
    """What `function` returns, called in a thread whose sockets, and whose child processes, see loopback only.

    Raises PermissionError where this user may not make a network.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_alone, function).result()


def _alone(function: Callable[[], T]) -> T:
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        code = ctypes.get_errno()
        raise PermissionError(code, f"no network of its own: {os.strerror(code)}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack_from("h", fcntl.ioctl(sock, SIOCGIFFLAGS, request), 16)[0]
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))
    return function()
