"""The 4-bit kernels under compute-sanitizer: a small grid of every kind of launch, each tool in turn.

    python benchmarks/sanitize.py --out benchmarks/results

Only kernels of this package are instrumented. Writes `sanitizer-<gpu>.json`: what each tool found, and on what.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gemm import random_weight
from gpu_timing import machine

from gptq_api.kernels import gemm, probes

TOOLS = ("memcheck", "racecheck", "synccheck")
TOOL_SECONDS = 60
"""a tool that takes longer is reported as not finished"""


def small_grid() -> list[str]:
    """Launches everything once and returns what: names with shapes."""
    done = []
    for dtype in (torch.float16, torch.bfloat16):
        for k, n, group_size, asym, ms in (
            (1160, 528, 128, False, (1, 8, 9, 20, 40, 100, 300)),
            (512, 272, 32, True, (3, 33)),
            (2048, 256, -1, True, (3, 33)),
            (11008, 272, 128, False, (1, 8)),  # two segments of k: in one block, in a cluster
            (256, 2112, 128, False, (4,)),  # blocks that bring x in together
        ):
            weight = random_weight(k, n, group_size, asym=asym, act_order=k == 1160, paired=True)
            for m in ms:
                x = torch.randn(m, k, device="cuda").to(dtype)
                bias, residual = torch.randn(n, device="cuda").to(dtype), torch.randn(m, n, device="cuda").to(dtype)
                gemm.gemm(x, weight, residual, bias=bias, residual=residual)
                gemm.gemm(x, weight, silu_mul=True)
                done.append(f"gemm M={m} K={k} N={n} group {group_size} {'asym' if asym else 'sym'} {dtype}")
            probes.dequantize(weight, dtype)
            done.append(f"dequantize K={k} N={n} {dtype}")
    torch.cuda.synchronize()
    return done


def check(tool: str) -> dict[str, Any]:
    command = ["compute-sanitizer", f"--tool={tool}", "--kernel-name", "kernel_substring=gptq"]
    command += ["--report-api-errors=no", "--print-limit=20"]
    began = time.monotonic()
    try:
        run = subprocess.run(
            [*command, sys.executable, __file__, "--work"], capture_output=True, text=True, timeout=TOOL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"finished": False, "seconds": TOOL_SECONDS}
    log = run.stdout + run.stderr
    summaries = re.findall(r"={9} (\w+ SUMMARY: .*)", log)
    counts = [int(count) for count in re.findall(r"SUMMARY: (\d+)", log)]
    errors = [line for line in log.splitlines() if re.match(r"={9} (Error|Invalid|Warning|Race|Barrier|Program)", line)]
    return {
        "finished": run.returncode == 0 and bool(counts),
        "found": sum(counts) if counts else None,
        "summary": summaries,
        "first_errors": errors[:10] if counts and sum(counts) else [] if counts else log.splitlines()[-10:],
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the .json")
    parser.add_argument("--commit", help="what was checked, where there is no git")
    parser.add_argument("--work", action="store_true", help="only launch the grid; what the tools run")
    options = parser.parse_args()
    if (reason := gemm.unavailable_reason()) is not None:
        sys.exit(f"nothing to check: {reason}")
    if options.work:
        small_grid()
        return
    if shutil.which("compute-sanitizer") is None:
        sys.exit("no compute-sanitizer on PATH; it comes with the CUDA toolkit")
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"Version (\S+)", version)
    result = machine(options.commit) | {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    result["versions"]["compute-sanitizer"] = found[1] if found else version.strip()
    result |= {"grid": small_grid(), "tools": {}}
    for tool in TOOLS:
        result["tools"][tool] = check(tool)
        print(tool, json.dumps(result["tools"][tool]), flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        name = f"sanitizer-{result['gpu'].lower().replace(' ', '-')}.json"
        (options.out / name).write_text(json.dumps(result, indent=1) + "\n")
    if any(not tool["finished"] or tool["found"] for tool in result["tools"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
