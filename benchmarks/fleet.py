"""Two servers of the demo behind smg: what the gateway adds to a request, how many prompts find their beginning cached,
and how many requests fail while each server is restarted, and when one is killed.

    python benchmarks/fleet.py --smg .clients/smg/bin/smg --out benchmarks/results/fleet-cpu.json

`make clients` installs smg. Times are those of one request after the other with one token, to a server and through the
gateway in turns. Exits with 1 where a request failed that need not have.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the fleet itself is in tests/support

from serve import machine

from tests.support.gateway import (
    DRAIN_DELAY_S,
    Fleet,
    asked_with_prefixes,
    hit_share,
    milliseconds,
    prefixes,
    under_load,
)

WHOLE = 128
"""tokens of the common beginnings that count as found"""


def added(fleet: Fleet, num: int) -> dict[str, float]:
    """Medians of so many requests each way, and the quickest tenth, which others on the machine disturb less."""
    pairs = milliseconds([f"http://127.0.0.1:{fleet.servers[0].port}", fleet.url], num)
    found = dict[str, float]()
    for name, of in (("", statistics.median), ("quickest_tenth_", lambda times: statistics.quantiles(times, n=10)[0])):
        direct, through = (of(times) for times in pairs)
        found |= {f"{name}direct_ms": round(direct, 2), f"{name}added_ms": round(through - direct, 2)}
    return found


def restarts(fleet: Fleet, times: int, least: int, users: int) -> dict[str, Any]:
    """Each server `times` times, one after the other, while users ask, at least `least` requests."""
    done, statuses, began = threading.Event(), list[int](), time.monotonic()

    def restart() -> None:
        try:
            for place in list(range(len(fleet.servers))) * times:
                statuses.append(fleet.stop(place))
                fleet.start(place)
        finally:
            done.set()

    thread = threading.Thread(target=restart)
    thread.start()
    load = under_load(fleet.url, lambda num: done.is_set() and num >= least, users)
    thread.join()
    return {
        "restarts": len(statuses),
        "exit_statuses": statuses,
        "users": users,
        "requests": load.num,
        "failed": len(load.failed),
        "what_failed": load.failed[:3],
        "seconds": round(time.monotonic() - began, 1),
    }


def killed(fleet: Fleet, users: int) -> dict[str, Any]:
    """One server gets SIGKILL in the middle."""
    shot = threading.Event()

    def until(num: int) -> bool:
        if num > 100 and not shot.is_set():
            shot.set()
            fleet.servers[0].signal(signal.SIGKILL)
        return num >= 500

    load = under_load(fleet.url, until, users)
    fleet.start(0)
    return {"users": users, "requests": load.num, "failed": len(load.failed), "what_failed": load.failed[:3]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smg", type=Path, required=True, help="its program")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--times", type=int, default=2, help="each server is restarted")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--timed", type=int, default=400, help="requests whose time is told, each way")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "machine": machine(),
        "load_average": os.getloadavg(),
        "servers": 2,
        "drain_delay_s": DRAIN_DELAY_S,
    }
    with Fleet(str(args.smg)) as fleet:
        result["per_request"] = added(fleet, args.timed)
        print(json.dumps(result["per_request"]), flush=True)
        load = asked_with_prefixes(fleet.url, prefixes(4), 12)
        share = round(hit_share(load, WHOLE), 3)
        result["prefixes"] = {"requests": load.num, "failed": len(load.failed), "hits_of_those_possible": share}
        print(json.dumps(result["prefixes"]), flush=True)
        result["rolling_restart"] = restarts(fleet, args.times, args.requests, args.users)
        print(json.dumps(result["rolling_restart"]), flush=True)
        result["one_killed"] = killed(fleet, args.users)
        print(json.dumps(result["one_killed"]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    restarted = result["rolling_restart"]["exit_statuses"] == [0] * (2 * args.times)
    return int(not restarted or result["rolling_restart"]["failed"] > 0 or result["one_killed"]["failed"] > args.users)


if __name__ == "__main__":
    sys.exit(main())
