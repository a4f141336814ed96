"""Write a GPTQ folder of random weights in the shape of a known model, to measure loading and serving with.

python -m benchmarks.synthetic llama-13b /fast/disk/llama-13b [--group-size 128] [--act-order] [--fp16]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from gptq_api.bench.synthetic import SHAPES, write_folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--group-size", type=int, default=128, help="-1: one group")
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--fp16", action="store_true", help="unquantized")
    args = parser.parse_args()
    started = time.monotonic()
    write_folder(args.model, args.folder, group_size=args.group_size, act_order=args.act_order, dense=args.fp16)
    size = sum(file.stat().st_size for file in args.folder.iterdir())
    print(f"{args.folder}: {size / 2**30:.1f} GiB in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
