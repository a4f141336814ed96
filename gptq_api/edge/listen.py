"""The listening sockets: bound early, listened on late."""

from __future__ import annotations

import errno
import socket

from gptq_api.errors import UserError

SEND_BUFFER = 128 * 1024
"""bytes; small, so that what a slow reader has not read waits as merged tokens and not as megabytes in the kernel"""


class PortError(UserError):
    """The address cannot be had: one sentence with the remedy."""


def in_use(host: str, port: int) -> PortError:
    return PortError(f"port {port} on {host} is in use: stop what runs there or choose another --port")


def bind(host: str, port: int) -> list[socket.socket]:
    """A bound socket for every address of `host` (localhost has two); port 0 picks a free one for all of them.

    Nobody can connect before somebody listens. Raises PortError.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise PortError(f"--host {host} is not an address of this machine: {error.strerror}") from None
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:  # a machine without IPv6
            failure = error
            continue
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            chosen = sockets[0].getsockname()[1] if sockets else port
            sock.bind((address[0], chosen, *address[2:]))
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRINUSE:
                for other in sockets:
                    other.close()
                raise in_use(host, port) from None
            failure = error
            continue
        sockets.append(sock)
    if not sockets:
        reason = failure.strerror if failure is not None else "no address"
        raise PortError(f"cannot bind {host} port {port}: {reason}")
    return sockets
