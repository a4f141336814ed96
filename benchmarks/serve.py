"""Load a running OpenAI server and measure what its users feel: throughput, time to first token, time between tokens.

    python benchmarks/serve.py --url http://127.0.0.1:8000/v1 --concurrency 1,8,32 --requests 64
    python benchmarks/serve.py --rate 4 --requests 64              # open loop: Poisson arrivals per second

Closed loop: N users, each sends its next request when the last one ended. Open loop: requests arrive at a rate whatever
the server does. Beside a long prompt: some answers are being written when another user sends that prompt; the row has
its time to the first token, and the time between tokens of the others until then. Plain HTTP/1.1 over asyncio sockets,
one connection per request, and many users in several processes, so that the client costs little beside the server;
works against any OpenAI-compatible server. `--spawn` starts the server itself and stops it again; the demo and random
weights repeat themselves, which `--speculate off` among its options leaves out of the figures. `--in-process` holds the
rates against those of the same load without HTTP:

    python benchmarks/decode.py --synthetic llama-13b --variants g128 --parts closed --out results
    python benchmarks/serve.py --spawn "--model-path /models/llama-13b" --prompt-tokens 128 --max-tokens 128 \
        --concurrency 1,8,32,64,128,256 --in-process results/decode-nvidia-h200.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from http_load import Bar, Load, Server, beside_a_long_prompt, closed_loop, from_several, open_loop, summary

USERS_PER_CLIENT = 32


def machine(commit: str | None = None) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), name
        )
    gpu = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or None
    if commit is None and shutil.which("git"):
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = found.stdout.strip() or None
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "python": platform.python_version(),
        "commit": commit,
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


def in_process_rate(args: argparse.Namespace, model: str, users: int) -> float | None:
    """Tokens/s of the same load without HTTP, from what benchmarks/decode.py wrote of a model of that name."""
    if args.in_process is None:
        return None
    for row in json.loads(args.in_process.read_text()).get(model, {"rows": []})["rows"]:
        same = (row.get("batch"), row.get("prompt"), row.get("new_tokens"))
        if row["part"] == "closed" and same == (users, args.prompt_tokens, args.max_tokens):
            return float(row["tok_s"])
    return None


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
        result: dict[str, Any] = {"model": model, "machine": machine(args.commit), "server": args.spawn, "rows": []}
        warm = await server.complete(Load(args, model).body())
        if warm.error:
            raise SystemExit(f"the server does not serve: {warm.error}")
        if start_s is not None:
            result["start_to_first_token_s"] = round(start_s + (warm.ttft or 0), 2)
        for users in args.concurrency:
            count = max(args.requests, 2 * users)
            clients = args.clients or min(math.ceil(users / USERS_PER_CLIENT), max(1, result["machine"]["cores"] // 2))
            if clients > 1:
                done = await from_several(clients, args, model, users, count)
            else:
                done = await closed_loop(server, Load(args, model), users, count, Bar(f"{users} users", count))
            row = {"mode": "closed", "concurrency": users, "clients": clients}
            row |= summary(done.calls, done.ended - done.began)
            if (alone := in_process_rate(args, model, users)) is not None:
                row |= {"in_process_tok_s": alone, "share": round(row["output_tokens_per_s"] / alone, 4)}
            result["rows"].append(row)
        for rate in args.rate:
            name = f"{rate:g} requests/s"
            calls, elapsed = await open_loop(server, Load(args, model), rate, args.requests, Bar(name, args.requests))
            result["rows"].append({"mode": "open", "rate": rate} | summary(calls, elapsed))
        load = Load(args, model)  # one, so that no prompt comes twice
        for length in args.beside:
            calls, others = await beside_a_long_prompt(server, load, args.answers, length)
            row = {"mode": "beside", "long_prompt": length, "answers": args.answers} | summary(calls, calls[0].total)
            result["rows"].append(row | {"inter_token_ms": others})
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
    lines.append("| load | requests | failed | tok/s | of in-process | TTFT p50 / p99 ms | inter-token p50 / p99 ms |")
    lines.append("|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        name = {
            "closed": "{concurrency} users",
            "open": "{rate:g} req/s",
            "beside": "{long_prompt} tokens beside {answers} answers",
        }[row["mode"]].format(**row)
        ttft, itl = row["ttft_ms"], row["inter_token_ms"]
        share = f"{row['share']:.1%}" if "share" in row else "-"
        lines.append(
            f"| {name} | {row['requests']} | {row['failed']} | {row['output_tokens_per_s']} | {share} | "
            f"{ttft.get('p50')} / {ttft.get('p99')} | {itl.get('p50')} / {itl.get('p99')} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(item) for item in text.split(",") if item]

    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="base URL of the server")
    parser.add_argument("--spawn", nargs="?", const="", help="start `gptq-api serve` with these options, in one string")
    parser.add_argument("--model", help="model name; default: the first the server lists")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    parser.add_argument("--concurrency", type=numbers(int), default=[1, 8, 32], help="closed loop: users, by commas")
    parser.add_argument("--clients", type=int, default=0, help="processes of the closed loop; default: by its users")
    parser.add_argument("--in-process", type=Path, help="a result of benchmarks/decode.py with the part `closed`")
    parser.add_argument("--rate", type=numbers(float), default=[], help="open loop: requests per second, by commas")
    parser.add_argument("--beside", type=numbers(int), default=[], help="tokens of a long prompt, by commas")
    parser.add_argument("--answers", type=int, default=4, help="of --max-tokens, that are written beside that prompt")
    parser.add_argument("--requests", type=int, default=32, help="requests per row (at least two per user)")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prompt", default="Tell me a story about a fox.")
    parser.add_argument("--prompt-tokens", type=int, default=0, help="random token ids instead of --prompt")
    parser.add_argument("--vocab-size", type=int, default=1000, help="upper bound of those ids")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="what was measured, where there is no git")
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
