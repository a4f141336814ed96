"""An image as a careful operator runs it: how large it is, how soon it is ready, how soon it ends.

    python benchmarks/image.py --out benchmarks/results/image-cpu.json

`make image` builds it, IMAGE names another than gptq-api:cpu. Size: the files in it, and what the engine says. Start:
from the engine's `run`, with nothing to write on and no rights, until /ready says 200; and the processor time of all
its processes until then, which others on the machine disturb less. End: from SIGTERM until the engine says that it is
gone, at rest and with a stream that is on its way.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the container is in tests/support

from serve import machine

from tests.support.containers import IMAGE, Container, NoEngineError, engine, image_config, unpacked

GRACE_S = 45
STORY = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 900, "ignore_eos": True}


def processor_s(pid: int) -> float | None:
    """Seconds that the processes of a container have computed, `pid` being the first; None where we may not look."""
    total = 0.0
    try:
        here = os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdecimal() and os.readlink(place / "ns" / "pid") == here:
                fields = (place / "stat").read_text().rpartition(")")[2].split()
                total += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
        except OSError:  # it has ended, or is another user's
            continue
    return round(total, 2)


def once(found: tuple[list[str], list[str]], image: str) -> dict[str, Any]:
    """Seconds of one start and one end at rest."""
    with Container(found, image=image) as container:
        computed = processor_s(int(container.inspect()["State"]["Pid"]))
        stop_s, status = container.stop(GRACE_S)
        told = [word for line in container.log().splitlines() for word in line.split() if "ready_after" in line]
        return {
            "ready_s": round(container.ready_s, 2),
            "told_s": float(next(word for word in told if word.startswith("ready_after")).split("'")[1].split()[0]),
            "processor_s": computed,
            "stop_s": round(stop_s, 2),
            "exit_status": status,
        }


def in_a_stream(found: tuple[list[str], list[str]], image: str) -> dict[str, Any]:
    """SIGTERM behind the first token of a story."""
    with Container(found, image=image) as container:
        ended: list[tuple[float, int]] = []
        with container.http.stream("POST", "/v1/chat/completions", json={**STORY, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            thread = threading.Thread(target=lambda: ended.append(container.stop(GRACE_S)))
            thread.start()
            whole = [line for line in lines if line][-1] == "data: [DONE]"
        thread.join()
        return {"stop_s": round(ended[0][0], 2), "exit_status": ended[0][1], "stream_was_whole": whole}


def version_of(program: list[str]) -> str:
    return subprocess.run([program[0], "--version"], capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default=IMAGE)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    try:
        found = engine(args.image)
    except NoEngineError as error:
        print(error, file=sys.stderr)
        return 1
    config = image_config(found, args.image)
    packages = "import torch, sys; print(sys.version.split()[0], torch.__version__)"
    inside = [*found[0], "run", "--rm", *found[1], "--entrypoint", "python3", args.image, "-c", packages]
    python, torch = subprocess.run(inside, capture_output=True, text=True, check=True).stdout.split()
    runs = []
    for _ in range(args.repeats):
        load = os.getloadavg()[0]
        runs.append({**once(found, args.image), "load_average": round(load, 2)})
        print(json.dumps(runs[-1]), flush=True)
    result: dict[str, Any] = {
        "machine": machine(),
        "engine": " ".join([*found[0], *found[1]]),
        "engine_version": version_of(found[0]),
        "image": {
            "python": python,
            "torch": torch,
            "version": config["Config"]["Labels"]["org.opencontainers.image.version"],
            "revision": config["Config"]["Labels"]["org.opencontainers.image.revision"],
            "unpacked_bytes": unpacked(found, args.image),
            "engine_says_bytes": int(config["Size"]),
        },
        "ready_s": statistics.median(run["ready_s"] for run in runs),
        "processor_s": [run["processor_s"] for run in runs],
        "quickest_ready_s": min(run["ready_s"] for run in runs),
        "stop_s": statistics.median(run["stop_s"] for run in runs),
        "grace_s": GRACE_S,
        "runs": runs,
        "in_a_stream": in_a_stream(found, args.image),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(run["exit_status"] for run in [*runs, result["in_a_stream"]]))


if __name__ == "__main__":
    sys.exit(main())
