"""Two ways in which a server should go on: its engine is killed, and nobody reads its log.

    python benchmarks/life.py --out benchmarks/results/life-cpu.json

Real servers of the demo model. `engine_killed`: with --restart-engine, seconds from `kill -9` until the last of 16
streams has its error event, and until a chat is answered again. `unread_log`: requests that are answered while stderr
is a pipe of 4 KiB that nobody reads, each of which has a line in the log.
"""

from __future__ import annotations

import argparse
import fcntl
import http.client
import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from serve import machine

sys.path.append(str(Path(__file__).parents[1]))

from tests.support.server import RawStream, Server, chat_body, chunks, wait_for

ENDLESS = chat_body("Tell me a story.", ignore_eos=True, temperature=0, stream=True)
START_S = 120.0


def engine_killed(runs: int = 3, streams: int = 16) -> dict[str, Any]:
    """Medians, and the worst."""
    told, ready = list[float](), list[float]()
    with Server("--restart-engine", str(runs)) as server:
        for _ in range(runs):
            told_s, ready_s = _kill(server, streams)
            told.append(told_s)
            ready.append(ready_s)
    return {
        "attack": "engine killed",
        "streams": streams,
        "told_s": round(statistics.median(told), 3),
        "told_s_max": round(max(told), 3),
        "ready_s": round(statistics.median(ready), 2),
        "ready_s_max": round(max(ready), 2),
    }


def _kill(server: Server, streams: int) -> tuple[float, float]:
    ends = dict[int, float]()

    def read(i: int, raw: RawStream) -> None:
        assert chunks(raw.events())[-1]["error"]["code"] == "engine_dead"
        ends[i] = time.monotonic()
        raw.close()

    raws = [RawStream(server, ENDLESS) for _ in range(streams)]
    for raw in raws:
        assert raw.head()[0] == 200
    readers = [threading.Thread(target=read, args=item) for item in enumerate(raws)]
    for reader in readers:
        reader.start()
    time.sleep(0.5)
    killed_at = time.monotonic()
    os.kill(server.engine_pid, signal.SIGKILL)
    for reader in readers:
        reader.join()
    assert len(ends) == streams
    wait_for(lambda: server.chat(max_tokens=1).status_code == 200, START_S)
    return max(ends.values()) - killed_at, time.monotonic() - killed_at


def unread_log(requests: int = 100_000) -> dict[str, Any]:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Server(port=port, wait=False, stderr=writing):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        wait_for(lambda: _listens(connection), START_S)
        began, answered = time.monotonic(), 0
        body = json.dumps(chat_body("Count from one to ten.", max_tokens=8))
        for i in range(requests):
            if i % 1000 == 0:
                connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            else:
                connection.request("GET", "/version")
            response = connection.getresponse()
            response.read()
            answered += response.status == 200
        seconds = time.monotonic() - began
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        (dropped,) = [line for line in lines if line.startswith("gptq_api:log_lines_dropped_total")]
        connection.close()
    os.close(reading)
    os.close(writing)
    return {
        "attack": "a log that nobody reads",
        "requests": requests,
        "answered": answered,
        "lines_dropped": int(float(dropped.rsplit(" ", 1)[1])),
        "requests_per_s": round(requests / seconds),
    }


def _listens(connection: http.client.HTTPConnection) -> bool:
    try:
        connection.connect()
    except ConnectionRefusedError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for measure, size in ((engine_killed, args.runs), (unread_log, args.requests)):
        rows.append(measure(size))
        print(json.dumps(rows[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
