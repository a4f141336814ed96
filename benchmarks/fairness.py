"""How long a second key waits for its first token behind one that sends hundreds of requests, and alone; and for all of
its answer.

    python benchmarks/fairness.py --out benchmarks/results/fairness-cpu.json

Both stream answers of the demo (or `--model`) from one server; the first key's are of 300 tokens. Rounds: alone; the
moment after the others have sent; then while they run and wait, each probe behind the one before. Ratios are of
medians. `--rounds` servers, of which the medians are told.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from serve import machine

PROBE = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 64}
FLOOD = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 300}


class Server:
    """`gptq-api serve` with two keys, and what was said to it."""

    def __init__(self, model: str, options: list[str]) -> None:
        command = [sys.executable, "-m", "gptq_api", "serve", model, "--port", "0", "--api-key", "first,second"]
        self.process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        for line in self.process.stderr:
            if "http://" in line and "/v1" in line:
                self.port = int(line.split("http://")[1].split("/")[0].rsplit(":", 1)[1])
                break
        else:
            raise SystemExit("the server did not start")
        # whoever does not read the log makes the server drop lines, and costs nothing here
        self.held: list[http.client.HTTPConnection] = []

    def ask(self, key: str, body: dict[str, Any]) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        data = json.dumps({**body, "stream": True, "ignore_eos": True, "temperature": 1.0})
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        connection.request("POST", "/v1/chat/completions", data, headers)
        return connection

    def probe(self) -> tuple[float, float]:
        """Milliseconds to its first text, and to its end."""
        started = time.perf_counter()
        answer = self.ask("second", PROBE).getresponse()
        first = 0.0
        for line in answer:
            if not first and b'"content":"' in line and b'"content":""' not in line:
                first = time.perf_counter()
        assert answer.status == 200 and first
        return (first - started) * 1e3, (time.perf_counter() - started) * 1e3

    def waiting(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics", headers={"authorization": "Bearer second"})
        lines = connection.getresponse().read().decode().splitlines()
        return int(float(next(line for line in lines if line.startswith("vllm:num_requests_waiting{")).split()[-1]))

    def close(self) -> None:
        for connection in self.held:
            connection.close()
        self.process.kill()
        self.process.wait()


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One server's. `waiting`: how many of the first key's still waited at the end."""
    server = Server(args.model, args.options)
    try:
        for _ in range(3):
            server.probe()
        alone = [server.probe() for _ in range(args.probes)]
        server.held = [server.ask("first", FLOOD) for _ in range(args.requests)]
        at_once, _ = server.probe()
        time.sleep(args.settle_s)
        behind = [server.probe() for _ in range(args.probes)]
        left = server.waiting()
    finally:
        server.close()
    row: dict[str, float] = {"behind_at_once_ms": round(at_once, 1), "waiting": left}
    for name, column in (("first_token", 0), ("answer", 1)):
        one, other = ([probe[column] for probe in probes] for probes in (alone, behind))
        row |= {
            f"{name}_alone_ms": round(statistics.median(one), 1),
            f"{name}_behind_ms": round(statistics.median(other), 1),
            f"{name}_behind_worst_ms": round(max(other), 1),
            f"{name}_ratio": round(statistics.median(other) / statistics.median(one), 2),
        }
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--probes", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settle-s", type=float, default=1.0, help="between the flood and the probes behind it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("options", nargs="*", help="of the server, behind --")
    args = parser.parse_args()
    rows = []
    for _ in range(args.rounds):
        rows.append(measure(args))
        print(json.dumps(rows[-1]), flush=True)
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    print("medians", json.dumps(medians))
    if args.out:
        result = {
            "machine": machine(),
            "load_average": os.getloadavg(),
            "requests": args.requests,
            "medians": medians,
            "rows": rows,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
