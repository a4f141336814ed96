"""What the host costs per token: the real server, sockets and engine process on a device that is only simulated.

    python benchmarks/host.py --streams 1,32,64,256 --out benchmarks/results/host-cpu.json

Users in a closed loop, each with a connection per request, stream answers of `--max-tokens` to prompts of
`--prompt-tokens` random tokens. CPU time is user + system of the process's clock, so it does not matter that client and
server share cores (the rest of the figures does suffer on a small machine). "share" is against the same load in the
same engine without HTTP and grammars, on a clock that only the device moves.

`--constrained 0,1,64`: of each load, so many streams have to be JSON of a schema. Times are those of the others, where
there are any.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from http_load import percentiles
from serve import machine
from simulated_device import FIRST_TOKEN, VOCAB_SIZE, SimulatedRunner

from gptq_api.bench.synthetic import write_small_files
from gptq_api.engine.core import Engine
from gptq_api.scheduler.blocks import BlockManager
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.types import Add, SamplingParams, pack_ids

HERE = Path(__file__).parent
MAX_NUM_SEQS, BUDGET = 256, 2048
SEEDS = itertools.count()
"""no load finds the prompts of another in the prefix cache"""

ON_SIMULATED_DEVICE = """
import sys
if "gptq_api.engine.process" in sys.orig_argv:
    from gptq_api.runner import load as runner
    from gptq_api.checkpoint.identity import Identity
    from simulated_device import SimulatedRunner
    runner.identify = lambda options: Identity("simulated", 0)
    runner.load_runner = lambda settings: SimulatedRunner()
"""


SCHEMA = {
    "type": "object",
    "properties": {
        "people": {
            "type": "array",
            "minItems": 1000,  # more than there are tokens for
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "age": {"type": "integer", "minimum": 0, "maximum": 150},
                    "role": {"enum": ["author", "editor", "reader"]},
                },
                "required": ["name", "age", "role"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["people"],
    "additionalProperties": False,
}


JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "people", "schema": SCHEMA}}


@dataclass(slots=True)
class State:
    """Of one stream."""

    started: float
    constrained: bool
    last: float | None = None
    tokens: int = 0
    tail: bytes = b""
    """where a constrained stream tells its count: its texts do not"""


class Client:
    """Reads streams and notes when their texts came, with as little work as that takes: no JSON, one thread."""

    def __init__(self, port: int, args: argparse.Namespace, users: int, constrained: int) -> None:
        self.port, self.args, self.rng = port, args, random.Random(next(SEEDS))
        self.constrained, self.all_constrained = constrained, constrained >= users
        self.selector = selectors.DefaultSelector()
        self.ttft: list[float] = []
        self.gaps: list[float] = []
        self.num_tokens = 0

    def run(self, users: int, requests: int) -> float:
        """Seconds from the first request to the end of the last answer."""
        bodies = [self.request(constrained=i % users < self.constrained) for i in range(requests)]
        began = time.perf_counter()
        for _ in range(min(users, requests)):
            self.send(*bodies.pop())
        num_open = min(users, requests)
        while num_open:
            for key, _ in self.selector.select():
                if self.read(key.fileobj, key.data):
                    if bodies:
                        self.send(*bodies.pop())
                    else:
                        num_open -= 1
        return time.perf_counter() - began

    def request(self, constrained: bool) -> tuple[bytes, bool]:
        args = self.args
        body: dict[str, Any] = {
            "prompt": [self.rng.randrange(FIRST_TOKEN, VOCAB_SIZE) for _ in range(args.prompt_tokens)],
            "max_tokens": args.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "ignore_eos": not constrained,
        }
        if constrained:
            body |= {"response_format": JSON_FORMAT}
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        return head.encode() + data, constrained

    def send(self, request: bytes, constrained: bool) -> None:
        sock = socket.create_connection(("127.0.0.1", self.port))
        started = time.perf_counter()
        sock.sendall(request)
        self.selector.register(sock, selectors.EVENT_READ, State(started, constrained))

    def read(self, sock: Any, state: State) -> bool:
        """Whether the stream is over."""
        data = sock.recv(1 << 20)
        now = time.perf_counter()
        if state.constrained:
            state.tail = (state.tail + data)[-512:]
            timed = self.all_constrained
            events = data.count(b'"finish_reason":null')
        else:
            timed, events = True, data.count(b"~")  # every token's text has one; late ones come several to a chunk
            state.tokens += events
        for _ in range(events if timed else 0):
            if state.last is None:
                self.ttft.append(now - state.started)
            else:
                self.gaps.append(now - state.last)
            state.last = now
        if data:
            return False
        if state.constrained:
            counts = re.findall(rb'"completion_tokens":(\d+)', state.tail)
            state.tokens = int(counts[-1]) if counts else 0
        if state.tokens != self.args.max_tokens:
            raise SystemExit(f"a stream of {state.tokens} tokens instead of {self.args.max_tokens}")
        self.num_tokens += state.tokens
        self.selector.unregister(sock)
        sock.close()
        return True


def command_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def cpu_seconds(pid: int) -> float:
    # The clock that clock_getcpuclockid(3) gives for a process, in nanoseconds: /proc/PID/stat counts ticks of 10 ms,
    # of which a short run may have none.
    return time.clock_gettime(~pid << 3 | 2)


def in_process_rate(args: argparse.Namespace, users: int, requests: int) -> float:
    """Tokens/s of the load without HTTP: all requests wait, as many as there are users run."""
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    runner = SimulatedRunner(now=lambda: clock[0], sleep=sleep)
    blocks = BlockManager(runner.num_blocks, runner.block_size)
    engine = Engine(runner, Scheduler(blocks, users, BUDGET))
    rng = random.Random(0)
    for i in range(requests):
        prompt = [rng.randrange(FIRST_TOKEN, VOCAB_SIZE) for _ in range(args.prompt_tokens)]
        engine.add(Add(i, pack_ids(prompt), (SamplingParams(max_tokens=args.max_tokens, temperature=0),)))
    while engine.has_work():
        engine.step()
    return float(requests * args.max_tokens / clock[0])


class Server:
    """The server on the simulated device; a context."""

    def __init__(self, folder: Path) -> None:
        model = folder / "llama-13b"
        write_small_files("llama-13b", model, 128, False)
        (model / "model.safetensors").touch()  # nobody reads it
        (folder / "sitecustomize.py").write_text(ON_SIMULATED_DEVICE)
        path = os.pathsep.join([str(folder), str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "gptq_api", "serve", "--port", "0", "--model-path", str(model)]
        command += ["--max-num-seqs", str(MAX_NUM_SEQS), "--max-num-batched-tokens", str(BUDGET)]
        self._log = folder / "log"
        with self._log.open("wb") as log:
            environment = os.environ | {"PYTHONPATH": path}
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        while (match := re.search(r"at http://[^\s\"]+:(\d+)/v1", self._log.read_text())) is None:
            if self.process.poll() is not None:
                raise SystemExit(self._log.read_text())
            time.sleep(0.05)
        self.port = int(match[1])
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        children = " ".join(task.read_text() for task in tasks).split()
        self.engine_pid = next(pid for pid in map(int, children) if b"gptq_api.engine.process" in command_of(pid))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, error: object, *rest: object) -> None:
        self.process.send_signal(signal.SIGTERM if error is None else signal.SIGKILL)
        self.process.wait()


def measure(server: Server, args: argparse.Namespace, users: int, constrained: int) -> dict[str, Any]:
    requests = args.rounds * users if users > 1 else 4 * args.rounds
    pids = {"api": server.process.pid, "engine": server.engine_pid}
    client = Client(server.port, args, users, constrained)
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    seconds = client.run(users, requests)
    burnt = {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}
    rate, ideal = client.num_tokens / seconds, in_process_rate(args, users, requests)
    return {
        "streams": users,
        "constrained": min(constrained, users),
        "requests": requests,
        "tok_s": round(rate, 1),
        "in_process_tok_s": round(ideal, 1),
        "share": round(rate / ideal, 4),
        **{f"{name}_us_per_token": round(cpu / client.num_tokens * 1e6, 1) for name, cpu in burnt.items()},
        "ttft_ms": percentiles(client.ttft),
        "inter_token_ms": percentiles(client.gaps),
    }


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=numbers, default=[1, 32, 64, 256])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2, help="requests of each user")
    parser.add_argument("--constrained", type=numbers, default=[0], help="streams at a time that are JSON of a schema")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder)) as server:
        measure(server, argparse.Namespace(**vars(args) | {"rounds": 1}), 8, max(args.constrained))  # warm
        rows = []
        for users in args.streams:
            for constrained in args.constrained:
                rows.append(measure(server, args, users, constrained))
                print(json.dumps(rows[-1]), flush=True)
    result = {"machine": machine(), "prompt_tokens": args.prompt_tokens, "max_tokens": args.max_tokens, "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
