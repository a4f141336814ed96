"""Load a running OpenAI server and measure what its users feel: throughput, time to first token, time between tokens.

    python benchmarks/serve.py --url http://127.0.0.1:8000/v1 --concurrency 1,8,32 --requests 64
    python benchmarks/serve.py --rate 4 --requests 64              # open loop: Poisson arrivals per second

Closed loop: N users, each sends its next request when the last one ended. Open loop: requests arrive at a rate whatever
the server does. Plain HTTP/1.1 over asyncio sockets, one connection per request, so that the client costs little
beside the server; works against any OpenAI-compatible server. `--spawn` starts the server itself and stops it again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Call:
    """One request as its sender saw it; times in seconds from the moment it was sent."""

    ttft: float | None = None
    arrivals: list[float] = field(default_factory=list)
    """when each chunk with text came"""
    total: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


class Server:
    """Where to send: splits the base URL once."""

    def __init__(self, url: str, api_key: str | None) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.prefix, self.api_key = parts.path.rstrip("/"), api_key

    async def request(self, method: str, path: str, body: dict[str, Any] | None) -> AsyncIterator[bytes]:
        """Send; yield the status line first, then the body as it arrives, de-chunked."""
        payload = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {self.host}:{self.port}", "Connection: close"]
        if body is not None:
            head += ["Content-Type: application/json", f"Content-Length: {len(payload)}"]
        if self.api_key:
            head.append(f"Authorization: Bearer {self.api_key}")
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=2**20)
        try:
            writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + payload)
            headers = await reader.readuntil(b"\r\n\r\n")
            yield headers.split(b"\r\n", 1)[0]
            if b"transfer-encoding: chunked" not in headers.lower():
                yield await reader.read()
                return
            while size := int(await reader.readline(), 16):
                yield (await reader.readexactly(size + 2))[:-2]
        finally:
            writer.close()

    async def json(self, method: str, path: str) -> Any:
        parts = [part async for part in self.request(method, path, None)]
        return json.loads(b"".join(parts[1:]))

    async def complete(self, body: dict[str, Any]) -> Call:
        call, started, buffer = Call(), time.perf_counter(), b""
        try:
            parts = self.request("POST", "/chat/completions" if "messages" in body else "/completions", body)
            status = await anext(parts)
            if b" 200" not in status:
                call.error = status.decode() + " " + b"".join([part async for part in parts]).decode()[:200]
                return call
            async for part in parts:
                buffer += part
                *events, buffer = buffer.split(b"\n\n")
                for event in events:
                    self._read(call, event, time.perf_counter() - started)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            call.error = f"{type(error).__name__}: {error}"
        call.total = time.perf_counter() - started
        if call.error is None and call.ttft is None:
            call.error = "no text came"
        return call

    @staticmethod
    def _read(call: Call, event: bytes, now: float) -> None:
        if not event.startswith(b"data: ") or event == b"data: [DONE]":
            return
        chunk = json.loads(event[6:])
        if "error" in chunk:
            call.error = chunk["error"]["message"]
        if usage := chunk.get("usage"):
            call.prompt_tokens, call.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        for choice in chunk.get("choices", []):
            text = choice.get("text") or choice.get("delta", {}).get("content")
            if text:
                call.ttft = now if call.ttft is None else call.ttft
                call.arrivals.append(now)


def percentiles(values: list[float], scale: float = 1e3) -> dict[str, float]:
    """p50, p90, p99 and mean of seconds, in milliseconds."""
    if not values:
        return {}
    ordered = sorted(values)
    at = {f"p{q}": ordered[min(len(ordered) - 1, int(len(ordered) * q / 100))] for q in (50, 90, 99)}
    return {name: round(value * scale, 2) for name, value in (at | {"mean": statistics.fmean(values)}).items()}


def summary(calls: list[Call], elapsed: float) -> dict[str, Any]:
    """One row of the result: rates over the whole run, percentiles over requests and over gaps between chunks."""
    good = [call for call in calls if call.error is None]
    gaps = [b - a for call in good for a, b in zip(call.arrivals, call.arrivals[1:], strict=False)]
    tokens = sum(call.completion_tokens for call in good)
    return {
        "requests": len(calls),
        "failed": len(calls) - len(good),
        "first_error": next((call.error for call in calls if call.error), None),
        "elapsed_s": round(elapsed, 3),
        "prompt_tokens": sum(call.prompt_tokens for call in good),
        "output_tokens": tokens,
        "output_tokens_per_s": round(tokens / elapsed, 1),
        "requests_per_s": round(len(good) / elapsed, 2),
        "ttft_ms": percentiles([call.ttft for call in good if call.ttft is not None]),
        "inter_token_ms": percentiles(gaps),
        "e2e_ms": percentiles([call.total for call in good]),
    }


class Load:
    """What every request asks for, drawn from a seed so that two runs send the same."""

    def __init__(self, args: argparse.Namespace, model: str) -> None:
        self.args, self.model, self.rng = args, model, random.Random(args.seed)

    def body(self) -> dict[str, Any]:
        args = self.args
        common = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": args.temperature,
            "max_tokens": args.max_tokens,
            "ignore_eos": True,
        }
        if args.prompt_tokens:
            ids = [self.rng.randrange(10, args.vocab_size) for _ in range(args.prompt_tokens)]
            return common | {"prompt": ids}
        return common | {"messages": [{"role": "user", "content": f"{args.prompt} ({self.rng.randrange(10**6)})"}]}


async def closed_loop(server: Server, load: Load, users: int, requests: int, bar: Bar) -> tuple[list[Call], float]:
    bodies = iter([load.body() for _ in range(requests)])
    calls: list[Call] = []

    async def user() -> None:
        for body in bodies:
            calls.append(await server.complete(body))
            bar.tick(calls[-1])

    started = time.perf_counter()
    await asyncio.gather(*[user() for _ in range(min(users, requests))])
    return calls, time.perf_counter() - started


async def open_loop(server: Server, load: Load, rate: float, requests: int, bar: Bar) -> tuple[list[Call], float]:
    async def one(body: dict[str, Any]) -> Call:
        call = await server.complete(body)
        bar.tick(call)
        return call

    started, tasks, due = time.perf_counter(), [], 0.0
    for _ in range(requests):
        due += load.rng.expovariate(rate)
        await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(load.body())))
    return list(await asyncio.gather(*tasks)), time.perf_counter() - started


class Bar:
    """A progress line on stderr, rewritten in place on a terminal, silent elsewhere."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done, self.failed, self.live = name, total, 0, 0, sys.stderr.isatty()

    def tick(self, call: Call) -> None:
        self.done += 1
        self.failed += call.error is not None
        if self.live:
            filled = "#" * (30 * self.done // self.total)
            end = "\n" if self.done == self.total else ""
            failed = f", {self.failed} failed" if self.failed else ""
            print(f"\r{self.name:>16} [{filled:<30}] {self.done}/{self.total}{failed}", end=end, file=sys.stderr)


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), name
        )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


async def spawn(options: list[str]) -> tuple[subprocess.Popen[str], str, float]:
    """Start `gptq-api serve` on a free port; returns the process, its base URL and the seconds until it answered."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "gptq_api", "serve", "--port", "0", *options]
    process = await asyncio.to_thread(
        subprocess.Popen, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout
    while line := await asyncio.to_thread(process.stdout.readline):
        print("  " + line.rstrip(), file=sys.stderr)
        if "http://" in line and "/v1" in line:
            url = "http://" + line.split("http://")[1].split()[0].strip("\"',")
            asyncio.get_running_loop().run_in_executor(None, process.stdout.read)
            return process, url, time.perf_counter() - started
    raise SystemExit("the server did not start")


def resident_mib(pid: int) -> float:
    """Resident memory of a process and its children, MiB."""
    total = 0.0
    pids = [pid]
    while pids:
        current = pids.pop()
        for line in Path(f"/proc/{current}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                total += int(line.split()[1]) / 1024
        for task in Path(f"/proc/{current}/task").iterdir():
            pids += [int(child) for child in (task / "children").read_text().split()]
    return round(total, 1)


async def run(args: argparse.Namespace) -> dict[str, Any]:
    process, start_s = None, None
    if args.spawn is not None:
        process, args.url, start_s = await spawn(args.spawn.split())
    server = Server(args.url, args.api_key)
    try:
        models = await server.json("GET", "/models")
        model = args.model or models["data"][0]["id"]
        result: dict[str, Any] = {"model": model, "machine": machine(), "server": args.spawn, "rows": []}
        warm = await server.complete(Load(args, model).body())
        if warm.error:
            raise SystemExit(f"the server does not serve: {warm.error}")
        if process:
            result["start_to_first_token_s"] = round(start_s + (warm.ttft or 0), 2)
        for users in args.concurrency:
            count = max(args.requests, 2 * users)
            calls, elapsed = await closed_loop(server, Load(args, model), users, count, Bar(f"{users} users", count))
            result["rows"].append({"mode": "closed", "concurrency": users} | summary(calls, elapsed))
        for rate in args.rate:
            name = f"{rate:g} requests/s"
            calls, elapsed = await open_loop(server, Load(args, model), rate, args.requests, Bar(name, args.requests))
            result["rows"].append({"mode": "open", "rate": rate} | summary(calls, elapsed))
        if process:
            result["resident_mib"] = resident_mib(process.pid)
        shape = ("prompt", "prompt_tokens", "max_tokens", "temperature", "seed")
        return result | {"load": {key: getattr(args, key) for key in shape}}
    finally:
        if process:
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait)


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['model']} on {result['machine']['cpu']}, {result['machine']['cores']} cores", ""]
    lines.append("| load | requests | failed | tok/s | TTFT p50 / p99 ms | between tokens p50 / p99 ms |")
    lines.append("|---|---|---|---|---|---|")
    for row in result["rows"]:
        name = f"{row['concurrency']} users" if row["mode"] == "closed" else f"{row['rate']:g} req/s"
        ttft, itl = row["ttft_ms"], row["inter_token_ms"]
        lines.append(
            f"| {name} | {row['requests']} | {row['failed']} | {row['output_tokens_per_s']} | "
            f"{ttft.get('p50')} / {ttft.get('p99')} | {itl.get('p50')} / {itl.get('p99')} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda kind: lambda text: [kind(item) for item in text.split(",") if item]  # noqa: E731
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="base URL of the server")
    parser.add_argument("--spawn", nargs="?", const="", help="start `gptq-api serve` with these options, in one string")
    parser.add_argument("--model", help="model name; default: the first the server lists")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    parser.add_argument("--concurrency", type=numbers(int), default=[1, 8, 32], help="closed loop: users, by commas")
    parser.add_argument("--rate", type=numbers(float), default=[], help="open loop: requests per second, by commas")
    parser.add_argument("--requests", type=int, default=32, help="requests per row (at least two per user)")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prompt", default="Tell me a story about a fox.")
    parser.add_argument("--prompt-tokens", type=int, default=0, help="random token ids instead of --prompt")
    parser.add_argument("--vocab-size", type=int, default=1000, help="upper bound of those ids")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    result = asyncio.run(run(args))
    print(table(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(row["failed"] for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
