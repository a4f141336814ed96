"""A client of any OpenAI server that costs little beside it: HTTP/1.1 over plain sockets, a connection for each
request, and the moment at which every piece of text came."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from gptq_api.errors import UserError


class LoadError(UserError):
    """The server cannot be measured: one sentence."""


@dataclass
class TimedCall:
    """One request as its sender saw it; times in seconds from the moment it was sent."""

    ttft: float | None = None
    arrivals: list[float] = field(default_factory=list)
    """when each chunk with text came"""
    total: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


class Endpoint:
    """Where to send: splits the base URL once."""

    def __init__(self, url: str, api_key: str | None) -> None:
        """LoadError for what is no address."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise LoadError(f"--url {url} is not an address: http://HOST:PORT/v1 is") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LoadError(f"--url {url} is not an address: http://HOST:PORT/v1 is")
        self.url, self.api_key = url, api_key
        self.host, self.port = parts.hostname, port or (443 if parts.scheme == "https" else 80)
        self.prefix = parts.path.rstrip("/") or "/v1"
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None

    async def request(self, method: str, path: str, body: dict[str, Any] | None) -> AsyncIterator[bytes]:
        """Send; yield the status line first, then the body as it arrives, de-chunked."""
        payload = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {self.host}:{self.port}", "Connection: close"]
        if body is not None:
            head += ["Content-Type: application/json", f"Content-Length: {len(payload)}"]
        if self.api_key:
            head.append(f"Authorization: Bearer {self.api_key}")
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=2**20, ssl=self._tls)
        try:
            writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + payload)
            headers = await reader.readuntil(b"\r\n\r\n")
            yield headers.split(b"\r\n", 1)[0]
            if b"transfer-encoding: chunked" not in headers.lower():
                yield await reader.read()
                return
            while size := int((await reader.readline()).split(b";")[0], 16):
                yield (await reader.readexactly(size + 2))[:-2]
        finally:
            writer.close()

    async def json(self, method: str, path: str) -> Any:
        """LoadError where it does not answer with JSON and 200."""
        try:
            status, *parts = [part async for part in self.request(method, path, None)]
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise LoadError(f"{self.url} cannot be reached ({error or type(error).__name__})") from None
        try:
            answer = json.loads(b"".join(parts))
        except ValueError:
            answer = None
        if b" 200" not in status or not isinstance(answer, dict):
            key = "; --api-key KEY is for servers that ask for one" if b" 401" in status else ""
            raise LoadError(f"{self.url}{path} answers {status.decode(errors='replace')}{key}")
        return answer

    async def complete(self, body: dict[str, Any]) -> TimedCall:
        """A request of a chat where `body` has messages, of a completion where it has a prompt. What goes wrong stands
        in the call."""
        call, started, rest = TimedCall(), time.perf_counter(), b""
        try:
            parts = self.request("POST", "/chat/completions" if "messages" in body else "/completions", body)
            status = await anext(parts)
            if b" 200" not in status:
                told = b"".join([part async for part in parts])
                call.error = f"{status.decode(errors='replace')} {told.decode(errors='replace')[:200]}"
                return call
            async for part in parts:
                *lines, rest = (rest + part).split(b"\n")
                now = time.perf_counter() - started
                for line in lines:
                    if line.startswith(b"data:"):
                        _read(call, line.removeprefix(b"data:").strip(), now)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            call.error = f"{type(error).__name__}: {error}"
        call.total = time.perf_counter() - started
        if call.error is None and call.ttft is None:
            call.error = "no text came"
        call.completion_tokens = call.completion_tokens or len(call.arrivals)  # of a server that does not count
        return call


def _read(call: TimedCall, data: bytes, now: float) -> None:
    if data == b"[DONE]":
        return
    chunk = json.loads(data)
    if "error" in chunk:
        call.error = str(chunk["error"].get("message") if isinstance(chunk["error"], dict) else chunk["error"])
    if usage := chunk.get("usage"):
        call.prompt_tokens, call.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    for choice in chunk.get("choices") or []:
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
            call.ttft = now if call.ttft is None else call.ttft
            call.arrivals.append(now)
