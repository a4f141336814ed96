"""What GPUs of one host need to exchange a layer's results: our kernels beside NCCL and torch's symmetric memory.

    python benchmarks/all_reduce.py --out benchmarks/results        # all GPUs that torch sees, a minute

Each figure is microseconds per call, the median over replays of a CUDA graph of many calls, on the rank that was
faster: it did not wait for the other to begin. Ours is what a layer does, an all-gather of rows of which each rank
has an equal part of the columns; NCCL's all-gather does the same, its all-reduce and the one-shot all-reduce of
symmetric memory are what layers do whose sums are cut. "Through the host" is ours as on cards that cannot write each
other's memory. Twice in a layer ours is one kernel with the RMSNorm behind it, which is there beside that norm alone.
Rows are 16-bit. NVLink multicast is not used by any of them. `soak` is our exchange with random delays on each rank,
every word compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gpu_timing import machine

from gptq_api.kernels import ops
from gptq_api.kernels.exchange import Exchange
from gptq_api.model.shard import Shard
from gptq_api.runner.ranks import RankGroup

ROWS, WIDTHS = (1, 2, 4, 8, 16, 32, 64, 512, 2048), (5120, 8192)
CALLS, REPLAYS = 100, 9
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def per_call(calls: Callable[[], None], meet: Callable[[], None], stream: torch.cuda.Stream) -> float:
    """us, of this rank."""
    with torch.cuda.stream(stream):
        calls()
        stream.synchronize()
        meet()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        calls()
        graph.capture_end()
        meet()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(REPLAYS):
            meet()
            begin.record()
            graph.replay()
            end.record()
            stream.synchronize()
            times.append(float(begin.elapsed_time(end)) * 1e3 / CALLS)
    return statistics.median(times)


def ours(size: int, through_host: bool) -> list[dict[str, Any]]:
    """Straight from one GPU into another one, or as on cards that cannot."""
    group, how = RankGroup(size), "ours, through the host" if through_host else "ours"

    def work(rank: int) -> list[tuple[str, int, int, float]]:
        torch.cuda.set_device(rank)
        own = group.ranks[rank]
        exchange, stream, found = Exchange(rank, size, own.each, through_host), torch.cuda.Stream(), []
        exchange.go_live()
        for width in WIDTHS:
            parts = [Shard(r, size).of(width) for r in range(size)]
            place = exchange.place(torch.zeros(max(ROWS), width, dtype=torch.float16, device="cuda"), parts)
            for rows in ROWS:
                part = place.own[:rows, parts[rank].start : parts[rank].stop]

                def calls(part: torch.Tensor = part, place: Any = place) -> None:
                    for _ in range(CALLS):
                        exchange.all_gather(place, part)

                found.append((how, width, rows, per_call(calls, own.meet, stream)))
            weight = torch.ones(width, dtype=torch.float16, device="cuda")
            out = torch.empty_like(place.own)
            for rows in (rows for rows in ROWS if exchange.normalizes(place, rows)):

                def both(rows: int = rows, place: Any = place, weight: Any = weight, out: Any = out) -> None:
                    for _ in range(CALLS):
                        exchange.all_gather_norm(place, rows, weight, 1e-5, out[:rows])

                def norm(rows: int = rows, place: Any = place, weight: Any = weight, out: Any = out) -> None:
                    for _ in range(CALLS):
                        ops.rms_norm(place.own[:rows], weight, 1e-5, out[:rows])

                found.append((f"{how}, with RMSNorm", width, rows, per_call(both, own.meet, stream)))
                found.append(("RMSNorm alone", width, rows, per_call(norm, own.meet, stream)))
        return found

    return [
        {"how": how, "width": width, "rows": rows, "us": round(min(one[-1] for one in of_ranks), 2)}
        for of_ranks in zip(*group.run(work), strict=True)
        for how, width, rows, _ in of_ranks[:1]
    ]


def _child(rank: int, size: int, port: int, results: Any) -> None:
    os.environ.update(NO_MULTICAST, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=size, device_id=torch.device("cuda", rank))
    stream, found = torch.cuda.Stream(), []

    def add(how: str, width: int, rows: int, call: Callable[[], Any]) -> None:
        def calls() -> None:
            for _ in range(CALLS):
                call()

        us = torch.tensor([per_call(calls, dist.barrier, stream)], device="cuda")
        dist.all_reduce(us, dist.ReduceOp.MIN)
        found.append({"how": how, "width": width, "rows": rows, "us": round(float(us), 2)})

    for width in WIDTHS:
        for rows in ROWS:
            x = torch.zeros(rows, width, dtype=torch.float16, device="cuda")
            part, whole = x.view(-1)[: x.numel() // size], torch.empty_like(x).view(-1)
            add("NCCL all-gather", width, rows, partial(dist.all_gather_into_tensor, whole, part))
            add("NCCL all-reduce", width, rows, partial(dist.all_reduce, x))
    try:
        import torch.distributed._symmetric_memory as symmetric

        world = dist.group.WORLD
        assert world is not None
        name = world.group_name
        buffer = symmetric.empty(64 * max(WIDTHS), dtype=torch.float16, device=torch.device("cuda", rank))
        symmetric.rendezvous(buffer, name)
        for width in WIDTHS:
            for rows in (rows for rows in ROWS if rows <= 64):
                part = buffer[: rows * width]
                call = torch.ops.symm_mem.one_shot_all_reduce
                add("symmetric memory, one-shot", width, rows, partial(call, part, "sum", name))
    except (RuntimeError, AttributeError, ImportError) as error:
        print(f"no figures of symmetric memory: {error}", file=sys.stderr)
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def others(size: int) -> list[dict[str, Any]]:
    context = mp.get_context("spawn")
    results, port = context.Queue(), 20000 + os.getpid() % 20000
    children = [context.Process(target=_child, args=(rank, size, port, results)) for rank in range(size)]
    for child in children:
        child.start()
    try:
        found: list[dict[str, Any]] = results.get(timeout=150)
    finally:
        for child in children:
            child.join(timeout=20)
            child.kill()
    return found


def soak(size: int, seconds: float, through_host: bool) -> dict[str, Any]:
    """Exchanges of 1 to 8 rows, word by word, in graphs of 200 with other delays on each rank."""
    group, stop = RankGroup(size), threading.Event()
    width = WIDTHS[1]

    def work(rank: int) -> tuple[int, int]:
        torch.cuda.set_device(rank)
        own, delays = group.ranks[rank], random.Random(rank)
        exchange, stream = Exchange(rank, size, own.each, through_host), torch.cuda.Stream()
        exchange.go_live()
        parts = [Shard(r, size).of(width) for r in range(size)]
        wrong = torch.zeros(1, dtype=torch.int64, device="cuda")
        state = torch.ones(8, width, dtype=torch.int16, device="cuda").view(torch.float16)
        with torch.cuda.stream(stream):
            place = exchange.place(torch.zeros(8, width, dtype=torch.float16, device="cuda"), parts)
            columns = slice(parts[rank].start, parts[rank].stop)

            def calls() -> None:
                for i in range(200):
                    rows = 1 + i % 8
                    # What every rank can tell: the words before, each with one added.
                    state.view(torch.int16).add_(1)
                    if delays.random() < 0.05:
                        torch.cuda._sleep(delays.randrange(20_000))
                    got = exchange.all_gather(place, state[:rows, columns])
                    wrong.add_((got.view(torch.int16) != state[:rows].view(torch.int16)).sum())

            calls()
            stream.synchronize()
            own.meet()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            calls()
            graph.capture_end()
            replays = 1
            if rank == 0:
                threading.Timer(seconds, stop.set).start()
            while not any(own.each(stop.is_set())):
                for _ in range(20):
                    graph.replay()
                replays += 20
                stream.synchronize()
        return int(wrong), replays * 200

    found = group.run(work)
    how = "soak, through the host" if through_host else "soak"
    return {"how": how, "exchanges": found[0][1], "differences": sum(wrong for wrong, _ in found)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soak-seconds", type=float, default=20)
    parser.add_argument("--commit", help="what was measured, where there is no git")
    parser.add_argument("--out", type=Path, help="folder for all-reduce-<gpu>-x<n>.json")
    args = parser.parse_args()
    size = torch.cuda.device_count()
    if size < 2:
        sys.exit(f"no benchmark: torch finds {size} CUDA devices, and an exchange takes two")
    os.environ.update(NO_MULTICAST)
    rows = [row for through_host in (False, True) for row in ours(size, through_host)]
    rows += [soak(size, args.soak_seconds / 2, through_host) for through_host in (False, True)]
    rows += others(size)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    result = machine(args.commit) | {
        "gpus": size,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "rows": rows,
    }
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"all-reduce-{result['gpu'].lower().replace(' ', '-')}-x{size}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
