"""Whether the server of this container is ready: exit status 0, or 1 and a sentence.

    python3 healthcheck.py

Asks /ready on the ports that processes of gptq-api listen on, wherever these were set: on the command line, in a
variable or in a file. They are read from /proc, of processes of this user.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import sys
from pathlib import Path

LISTENING = "0A"
SECONDS = 3.0
PROC = Path("/proc")


def servers() -> list[int]:
    """Processes that are `gptq-api serve`, or would be: without a command line that can be read there are none."""
    found = []
    for place in PROC.iterdir():
        if place.name.isdecimal() and int(place.name) != os.getpid():
            try:
                words = (place / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"serve" in words and any(word.endswith((b"gptq-api", b"gptq_api", b"__main__.py")) for word in words):
                found.append(int(place.name))
    return found


def sockets(pid: int) -> set[str]:
    """Inodes of its sockets; none where we may not look."""
    found = set()
    try:
        for link in (PROC / str(pid) / "fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:
        pass
    return found


def address(text: str) -> tuple[str, int]:
    """`0100007F:1F90` of /proc/net/tcp -> (127.0.0.1, 8000): words of 32 bits in the order of the machine. Whoever
    listens everywhere is asked on the loopback."""
    host, _, port = text.partition(":")
    words = [bytes.fromhex(host[at : at + 8]) for at in range(0, len(host), 8)]
    if sys.byteorder == "little":
        words = [word[::-1] for word in words]
    found = ipaddress.ip_address(b"".join(words))
    if found.is_unspecified:
        return ("127.0.0.1" if found.version == 4 else "::1"), int(port, 16)
    return str(found), int(port, 16)


def listens(pid: int) -> list[tuple[str, int]]:
    """(address, port) of each port that the process listens on."""
    mine, found = sockets(pid), []
    for name in ("tcp", "tcp6"):
        try:
            lines = (PROC / str(pid) / "net" / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, _, _, _, _, _, inode = line.split()[:10]
            if state == LISTENING and inode in mine:
                found.append(address(local))
    return found


def answer(host: str, port: int) -> str:
    """Empty where it is ready; why it is not."""
    connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    try:
        connection.request("GET", "/ready")
        response = connection.getresponse()
        return "" if response.status == 200 else f"/ready says {response.status}"
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()


def main() -> int:
    running = servers()
    if not running:
        print("no process of gptq-api serve is running here")
        return 1
    places = [place for pid in running for place in listens(pid)]
    if not places:
        print(f"process {running[0]} of gptq-api listens on no port yet")
        return 1
    why = {place: answer(*place) for place in places}
    if "" in why.values():
        return 0
    print("; ".join(f"port {port}: {reason}" for (_, port), reason in why.items()))
    return 1


if __name__ == "__main__":
    sys.exit(main())
