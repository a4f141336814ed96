"""A real server as a child process, for tests: any flags, a free port, its log in a file, killed by its pid."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

START_S = 60
ONE_THREAD = ("--num-threads", "1")
"""On a busy machine two threads of a small model wait for each other most of the time."""


def limit_files(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Server:
    """`with Server("--max-queued-requests", "4") as server:`; ready when the block begins, gone when it ends."""

    def __init__(
        self,
        *flags: str,
        env: dict[str, str] | None = None,
        port: int = 0,
        wait: bool = True,
        command: Sequence[str] | None = None,
        stderr: int = subprocess.STDOUT,
        max_files: int | None = None,
    ) -> None:
        """Tests watch answers while they come, and one that was given before comes at once where it is drafted. So
        nothing is drafted, unless `flags` say --speculate.

        `command`: all that stands after `gptq-api`, instead of `serve` with a free port, one thread and `flags`.
        `stderr`: a descriptor for the log; without its lines there is nothing to wait for. `max_files`: `ulimit -n`."""
        if command is None and "--speculate" not in flags:
            flags = ("--speculate", "off", *flags)
        arguments = ["serve", "--port", str(port), *ONE_THREAD, *flags] if command is None else command
        self._log = tempfile.NamedTemporaryFile(suffix=".log")  # noqa: SIM115  (closed by close)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gptq_api", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=stderr,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # ^C in the test run is not for the server
            preexec_fn=None if max_files is None else partial(limit_files, max_files),
        )
        self.port = port
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        try:
            match = wait_for(self._announced, START_S)
        except BaseException:
            self.close()
            raise
        self.port = int(match[2])
        self.url = match[1]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False)

    def _announced(self) -> re.Match[str] | None:
        match = re.search(r"serving \S+ at (http://[^\s\"]+:(\d+)/v1)", self.log())
        if match is None and self.process.poll() is not None:
            raise AssertionError(f"the server left with {self.process.returncode}:\n{self.log()}")
        return match

    def log(self) -> str:
        return Path(self._log.name).read_text()

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.http.post(path, json=body, headers={name.replace("_", "-"): text for name, text in headers.items()})

    def chat(self, content: str = "Hello", **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", chat_body(content, **fields))

    def metric(self, *names: str, **labels: str) -> float:
        """The value of one series of /metrics, or the sum of several as of one moment."""
        lines, total = self.http.get("/metrics").text.splitlines(), 0.0
        for name in names:
            found = [
                line
                for line in lines
                if re.match(rf"{re.escape(name)}[{{ ]", line) and all(f'{k}="{v}"' in line for k, v in labels.items())
            ]
            assert found, f"no metric {name} {labels}"
            total += float(found[0].rsplit(" ", 1)[1])
        return total

    def wait_idle(self, seconds: float = 5) -> None:
        wait_for(lambda: self.metric("vllm:num_requests_running") == 0, seconds)

    def children(self) -> list[int]:
        """Its child processes that run."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")  # a child belongs to the thread that made it
        return [pid for task in tasks for pid in map(int, task.read_text().split()) if alive(pid)]

    @property
    def engine_pid(self) -> int:
        """Raises StopIteration where there is no engine now."""
        return next(pid for pid in self.children() if b"gptq_api.engine.process" in _command_of(pid))

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 15) -> int:
        """The exit status."""
        return self.process.wait(seconds)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if hasattr(self, "http"):
            self.http.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            print(self.log())
        self.close()


def chat_body(content: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **fields}


def refuses(response: httpx.Response) -> bool:
    """Whether a request was refused since the server has no such thing, for tests that wait for it to come."""
    return response.status_code == 400 and response.json()["error"]["code"] == "unsupported_parameter"


def wait_for(probe: Callable[[], Any], seconds: float) -> Any:
    """What `probe` returns, once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := probe()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.02)
    return value


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class RawStream:
    """One streamed request over a bare socket: the bytes as they are, and a reader that may stop reading."""

    def __init__(
        self, server: Server, body: dict[str, Any], path: str = "/v1/chat/completions", rcvbuf: int = 0, key: str = ""
    ) -> None:
        self.sock = socket.socket()
        if rcvbuf:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        self.sock.settimeout(30)
        self.sock.connect(("127.0.0.1", server.port))
        extra = [f"Authorization: Bearer {key}"] if key else []
        self.sock.sendall(raw_request(path, json.dumps(body).encode(), *extra))
        self._buffer = b""

    def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers."""
        while b"\r\n\r\n" not in self._buffer:
            self._more()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        return int(first.split()[1]), {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}

    def events(self) -> Iterator[bytes]:
        """The payload between the blank lines, HTTP's chunks joined, comments left out; ends with the response."""
        data = b""
        while True:
            while b"\r\n" not in self._buffer:
                self._more()
            size_text, _, self._buffer = self._buffer.partition(b"\r\n")
            size = int(size_text, 16)
            while len(self._buffer) < size + 2:
                self._more()
            data += self._buffer[:size]
            self._buffer = self._buffer[size + 2 :]
            while b"\n\n" in data:
                event, _, data = data.partition(b"\n\n")
                if not event.startswith(b":"):
                    yield event
            if size == 0:
                assert data == b""
                return

    def _more(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._buffer += data

    def close(self) -> None:
        self.sock.close()


def raw_request(path: str, body: bytes, *extra: str, method: str = "POST") -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, *extra, "", ""]).encode() + body


def chunks(events: Iterator[bytes] | list[bytes]) -> list[dict[str, Any]]:
    """The JSON of a stream's events; asserts that [DONE] is the last one and that each is one data line."""
    found = list(events)
    assert found[-1] == b"data: [DONE]"
    assert all(event.startswith(b"data: ") and b"\n" not in event and b"\r" not in event for event in found)
    return [json.loads(event[6:]) for event in found[:-1]]


def stream_chunks(server: Server, body: dict[str, Any], path: str = "/v1/chat/completions") -> list[dict[str, Any]]:
    """The chunks of one streamed answer."""
    raw = RawStream(server, {**body, "stream": True}, path)
    try:
        status, _ = raw.head()
        assert status == 200
        return chunks(raw.events())
    finally:
        raw.close()


def check_error(response: Any, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The error object of a response that is one in OpenAI's shape, bounded."""
    assert response.status_code == status, response.text
    assert len(response.content) <= 2048
    assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]
    assert response.json().keys() == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)
    assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    return error
