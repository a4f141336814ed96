"""A reverse proxy that serves servers below paths of its own host, as nginx does with
`location /llm/ { proxy_pass http://server/; }`, and sends on what comes when it comes."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from types import TracebackType
from typing import Self

HEAD = re.compile(rb"(\S+) (\S+) HTTP/1\.1\r\n(.*?\r\n)\r\n", re.DOTALL)


class PrefixProxy:
    """`with PrefixProxy({"/llm": server.port}) as proxy:`; a browser asks its `port`. One request to a connection."""

    def __init__(self, ports: dict[str, int]) -> None:
        self._ports = ports
        self.strays: list[str] = []
        """paths that were asked for and are below none of these: on a real host they are somebody else's"""
        self._sock = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._sock.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                client, _ = self._sock.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(ConnectionError):
            data = b""
            while (head := HEAD.match(data)) is None:
                if not (part := client.recv(2**16)):
                    return
                data += part
            method, path, fields = (part.decode("latin-1") for part in head.groups())
            prefix = next((one for one in self._ports if path == one or path.startswith(f"{one}/")), None)
            if prefix is None:
                self.strays.append(path)
                client.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            inner = path.removeprefix(prefix) or "/"
            fields = re.sub(r"(?im)^connection:.*\r\n", "", fields)
            told = f"{method} {inner} HTTP/1.1\r\n{fields}Connection: close\r\n\r\n".encode("latin-1")
            with socket.create_connection(("127.0.0.1", self._ports[prefix])) as server:
                server.sendall(told + data[head.end() :])
                threading.Thread(target=_pump, args=(client, server), daemon=True).start()
                _pump(server, client)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Until one of them has ended, of which the other is told."""
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
