"""What a client, a file or a pipe can do to a server, in figures; what must be reached stands beside what was measured.

    python benchmarks/attack.py --out benchmarks/results/attack-cpu.json   # all rows, medians of three: 12 minutes
    python benchmarks/attack.py --rows health_beside_bombs --rounds 1
    python benchmarks/attack.py --page                                     # docs/measurements.md, from that file

The demo model, on a machine that is otherwise idle. Attackers are processes of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the attacks themselves are in tests/attack

import httpx
from pages import MEASUREMENTS, Part
from serve import machine

from gptq_api.demo import DEMO_PATH
from gptq_api.text.chat_template import load_chat_template
from gptq_api.text.process import TextProcess
from gptq_api.text.tokenizer import load_tokenizer
from tests.attack.bodies import Generator, fault
from tests.attack.bombs import TEMPLATES, loaded
from tests.attack.checkpoints import derived, with_template
from tests.attack.client import Request, ask_all
from tests.attack.clients import CHAT, connections, events, resident_bytes
from tests.support.server import Server, chat_body, raw_request, wait_for

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "attack-cpu.json"
SOAK = RESULT.with_name("soak-cpu.json")
PART = Part(MEASUREMENTS, "attacks", "benchmarks/attack.py")
NUM_LOOKS = 200
Figures = dict[str, float]


@contextlib.contextmanager
def attacker(work: Callable[..., None], *args: Any) -> Iterator[None]:
    """`work(left, *args)` in a process of its own, until the block ends."""
    left = multiprocessing.Event()
    process = multiprocessing.Process(target=work, args=(left, *args), daemon=True)
    process.start()
    try:
        time.sleep(1)
        yield
    finally:
        left.set()
        process.join(10)
        process.kill()
        process.join()


def send_tiny_chunks(left: Event, port: int) -> None:
    """A body in chunks of a byte, as fast as it is taken, from somebody without a key."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    while not left.is_set():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
            while not left.is_set():
                sock.sendall(b"1\r\nx\r\n" * 10_000)


def send_bodies(left: Event, port: int, kind: str) -> None:
    """The largest bodies that are taken, again and again."""
    body = {
        "text": lambda: json.dumps(chat_body("x" * 7_900_000)),
        "keys": lambda: json.dumps({"messages": [], **{str(i): 0 for i in range(700_000)}}, separators=(",", ":")),
        "lists": lambda: '{"messages":[' + "[]," * 2_700_000 + "[]]}",
        "ids": lambda: json.dumps({"prompt": [7] * 1_000_000}),
    }[kind]().encode()
    request = raw_request("/v1/completions" if kind == "ids" else CHAT, body)
    assert len(request) < 8 * 2**20
    while not left.is_set():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
            sock.sendall(request)
            while sock.recv(65536):
                pass


def send_bombs(left: Event, port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
        while not left.is_set():
            for name in list(TEMPLATES)[::5]:
                http.post(CHAT, json=chat_body(name, max_tokens=1))
                if left.is_set():
                    return


def health(server: Server) -> Figures:
    """Milliseconds of /health, one look after the other on one connection."""
    times = []
    for _ in range(NUM_LOOKS):
        started = time.perf_counter()
        assert server.http.get("/health").status_code == 200
        times.append((time.perf_counter() - started) * 1e3)
        time.sleep(0.01)
    times.sort()
    return {"p50_ms": statistics.median(times), "p99_ms": times[int(0.99 * len(times))], "max_ms": times[-1]}


def health_alone() -> Figures:
    with Server() as server:
        return health(server)


def health_beside_tiny_chunks() -> Figures:
    with Server("--api-key", "key") as server, attacker(send_tiny_chunks, server.port):
        return health(server)


def health_beside_bodies(kind: str) -> Figures:
    with Server("--max-body-bytes", str(8 * 2**20)) as server, attacker(send_bodies, server.port, kind):
        return health(server)


def health_beside_bombs() -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        model = derived(Path(folder) / "model", tokenizer_config=with_template(loaded(TEMPLATES)))
        with Server("--model-path", str(model)) as server, attacker(send_bombs, server.port):
            return health(server)


def malformed_bodies() -> Figures:
    with Server("--max-model-len", "128") as server:
        generator = Generator(server.http.get("/openapi.json").json(), random.Random(time.time_ns()))
        replies = asyncio.run(ask_all(server.port, generator.requests(2000)))
        wrong = [why for why in map(fault, replies) if why is not None]
        return {
            "bodies": len(replies),
            "5xx": sum(why.startswith("status") for why in wrong),
            "unanswered": sum(why.startswith("unanswered") for why in wrong),
            "wrong": len(wrong),
        }


def render_in_a_child() -> Figures:
    """Milliseconds that rendering and encoding a chat of 1,000 tokens takes more through the child process."""
    tokenizer = load_tokenizer(DEMO_PATH)
    template = load_chat_template(DEMO_PATH, tokenizer)
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": "What is the capital of France? " * 6} for i in range(20)
    ]
    num_tokens = len(template.render(turns))

    async def through_child() -> float:
        process = TextProcess(DEMO_PATH)
        await process.start()
        times = []
        for _ in range(300):
            started = time.perf_counter()
            await process.render(turns)
            times.append(time.perf_counter() - started)
        process.close()
        return statistics.median(times) * 1e3

    direct = []
    for _ in range(300):
        started = time.perf_counter()
        template.render(turns)
        direct.append(time.perf_counter() - started)
    here, there = statistics.median(direct) * 1e3, asyncio.run(through_child())
    return {"tokens": num_tokens, "here_ms": here, "child_ms": there, "added_ms": there - here}


def body_memory() -> Figures:
    """MiB that the API process grows by while 100 clients hold all but the end of an 8 MB body."""
    body = json.dumps(chat_body("x" * 7_900_000)).encode()
    head = raw_request(CHAT, body).removesuffix(body)
    with Server("--body-timeout-s", "10", "--max-body-bytes", str(8 * 2**20)) as server:
        server.chat(max_tokens=1)
        before, most = resident_bytes(server.process.pid), 0
        with connections(server.port, 100, head) as socks:

            def send(sock: socket.socket) -> None:
                with contextlib.suppress(OSError):
                    sock.settimeout(5)
                    sock.sendall(body[:-100])

            senders = [threading.Thread(target=send, args=(sock,)) for sock in socks]
            for sender in senders:
                sender.start()
            while any(sender.is_alive() for sender in senders):
                most = max(most, resident_bytes(server.process.pid) - before)
                time.sleep(0.02)
        return {"mib": most / 2**20}


def stopped_log_reader() -> Figures:
    """Requests that are served while nobody reads the pipe that the log goes to."""
    reader, writer = os.pipe()
    with contextlib.ExitStack() as stack:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = stack.enter_context(Server("--log-json", port=port, stderr=writer, wait=False))
        os.close(writer)
        stack.callback(os.close, reader)
        wait_for(lambda: b"ready_after" in os.read(reader, 65536), 60)
        requests = [Request("/version", method="GET")] * 100_000
        started = time.perf_counter()
        replies = asyncio.run(ask_all(port, requests))
        seconds = time.perf_counter() - started
        del server
    return {"served": sum(reply.status == 200 for reply in replies), "per_s": len(replies) / seconds}


def killed_engine() -> Figures:
    """kill -9 of the engine with --restart-engine: milliseconds until the last of 16 streams is told, seconds until
    /ready is 200 again."""
    with Server("--restart-engine", "3") as server:

        async def told() -> tuple[float, float]:
            begun, ends = 0, list[float]()

            async def read(i: int) -> None:
                nonlocal begun
                first = True
                async for event in events(server.port, chat_body(f"Story {i}", ignore_eos=True)):
                    begun += first
                    first = False
                    if '"error"' in event:
                        ends.append(time.perf_counter())

            async with asyncio.TaskGroup() as group:
                for i in range(16):
                    group.create_task(read(i))
                while begun < 16:
                    await asyncio.sleep(0.01)
                killed = time.perf_counter()
                os.kill(server.engine_pid, signal.SIGKILL)
            assert len(ends) == 16
            return killed, max(ends)

        killed, last = asyncio.run(told())
        while server.http.get("/ready").status_code != 200:
            time.sleep(0.02)
        return {"told_ms": (last - killed) * 1e3, "ready_s": time.perf_counter() - killed}


def second_key() -> Figures:
    """How many times as long one key's request takes behind another key's 400 as it takes beside 64 of them."""
    body = chat_body("Count from one to ten.", max_tokens=128, ignore_eos=True)
    with Server("--api-key", "first,second", "--max-num-seqs", "16") as server:

        def ask(key: str) -> float:
            started = time.perf_counter()
            answer = server.post(CHAT, body, authorization=f"Bearer {key}")
            assert answer.status_code == 200, answer.text
            return time.perf_counter() - started

        def load(count: int) -> float:
            async def run() -> float:
                requests = [
                    Request(CHAT, json.dumps(body).encode(), (("Content-Type", "application/json"), FIRST))
                    for _ in range(count)
                ]
                asked = asyncio.ensure_future(ask_all(server.port, requests, count))
                await asyncio.sleep(3)  # all have come
                seconds = await asyncio.to_thread(ask, "second")
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
                return seconds

            return asyncio.run(run())

        ask("second")
        alone = load(15)  # it shares a step, and waits for nobody
        wait_for(
            lambda: "vllm:num_requests_running" in metrics(server) and idle(server),
            60,
        )
        behind = load(400)
        return {"alone_s": alone, "behind_s": behind, "times": behind / alone}


FIRST = ("Authorization", "Bearer first")


def metrics(server: Server) -> str:
    return server.http.get("/metrics", headers={"authorization": "Bearer second"}).text


def idle(server: Server) -> bool:
    return all(
        line.endswith(" 0.0")
        for line in metrics(server).splitlines()
        if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))
    )


Row = tuple[str, Callable[[], Figures], str, float, str]
ROWS: dict[str, Row] = {
    "health_alone": ("`/health` alone, p99", health_alone, "p99_ms", float("inf"), "ms"),
    "health_beside_tiny_chunks": (
        "`/health` p99 beside one-byte chunks",
        health_beside_tiny_chunks,
        "p99_ms",
        50,
        "ms",
    ),
    "health_beside_text": ("beside 8 MB bodies", lambda: health_beside_bodies("text"), "p99_ms", 50, "ms"),
    "health_beside_keys": ("beside 700,000 keys", lambda: health_beside_bodies("keys"), "p99_ms", 50, "ms"),
    "health_beside_lists": ("beside 2.7 million lists", lambda: health_beside_bodies("lists"), "p99_ms", 50, "ms"),
    "health_beside_ids": ("beside a million ids", lambda: health_beside_bodies("ids"), "p99_ms", 50, "ms"),
    "health_beside_bombs": ("beside template bombs", health_beside_bombs, "p99_ms", 50, "ms"),
    "malformed_5xx": ("2,000 malformed bodies: 5xx", malformed_bodies, "5xx", 0, ""),
    "malformed_unanswered": ("unanswered", malformed_bodies, "unanswered", 0, ""),
    "render_in_a_child": ("render and encode 1,000 tokens in the child, added", render_in_a_child, "added_ms", 1, "ms"),
    "body_memory": ("memory of 100 unfinished 8 MB bodies", body_memory, "mib", 64, "MiB"),
    "stopped_log_reader": ("requests served while nobody reads the log", stopped_log_reader, "served", 100_000, ""),
    "killed_engine_told": ("`kill -9` of the engine: 16 streams told", killed_engine, "told_ms", 200, "ms"),
    "killed_engine_ready": ("ready again", killed_engine, "ready_s", 6, "s"),
    "second_key": ("a key's request behind another key's 400, times as long", second_key, "times", 2, ""),
}
"""name -> what it is called, how it is measured, which of its figures counts, what it must reach, its unit"""
AT_LEAST = {"stopped_log_reader"}


def median(runs: list[Figures]) -> Figures:
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


def measure(names: list[str], rounds: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    found: dict[Any, list[Figures]] = {}
    for name in names:
        label, run, figure, must, unit = ROWS[name]
        if run not in found:
            found[run] = [run() for _ in range(rounds)]
        values = median(found[run])
        met = values[figure] >= must if name in AT_LEAST else values[figure] <= must
        rows[name] = {
            "what": label,
            "value": values[figure],
            "must": None if must == float("inf") else must,
            "unit": unit,
            "met": met,
            "figures": values,
        }
        print(json.dumps({name: rows[name]}), flush=True)
    return rows


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "uvicorn", "h11", "fastapi", "tokenizers")}


def shown(value: float, unit: str) -> str:
    text = f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}" if value < 1 else f"{value:.1f}"
    return f"{text} {unit}".strip()


def table(result: dict[str, Any]) -> str:
    about = result["machine"]
    rows = [
        f"{about['cores']} cores of {about['cpu']}, {about['date']}, commit {about['commit']}, "
        f"medians of {result['rounds']}:",
        "",
        "| | measured | must |",
        "|---|---|---|",
    ]
    for name, row in result["rows"].items():
        must = "" if row["must"] is None else shown(row["must"], row["unit"])
        if must and row["must"]:
            must = ("at least " if name in AT_LEAST else "at most ") + must
        rows.append(f"| {row['what']} | {shown(row['value'], row['unit'])} | {must} |")
    if SOAK.exists():
        soak = json.loads(SOAK.read_text())
        about = f"soak of {soak['minutes']:.0f} minutes, {soak['requests']:,} requests (`benchmarks/soak.py`)"
        rows.append(
            f"| {about}: memory of the API process | {soak['api_mib_per_min']} MiB/min | at most 0.05 MiB/min |"
        )
        rows.append(
            f"| memory of the engine, the first use of its KV cache included | {soak['engine_mib_per_min']} MiB/min | |"
        )
        rows.append(f"| wrong answers | {soak['wrong']} | 0 |")
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: text.split(","), default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="rows that are not measured now keep what the file says")
    parser.add_argument(
        "--page", action="store_true", help="write the table of docs/measurements.md and measure nothing"
    )
    args = parser.parse_args()
    if args.page:
        PART.write(table(json.loads(RESULT.read_text())))
        return 0
    rows = measure(args.rows, args.rounds)
    if args.out:
        if args.out.exists():
            before = json.loads(args.out.read_text())["rows"]
            rows = {name: rows.get(name) or before[name] for name in ROWS if name in rows or name in before}
        about = {**machine(), "versions": versions(), "load": os.getloadavg()[1]}
        args.out.write_text(json.dumps({"machine": about, "rounds": args.rounds, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
