"""A server under everything at once: what it holds and how long it takes, minute after minute.

    python benchmarks/soak.py --minutes 30 --out benchmarks/results/soak-cpu.json

tests/attack/soak.py is what is done to it. Exits with 1 where an answer was wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the attacks themselves are in tests/attack

from serve import machine

from tests.attack.soak import soak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = soak(60 * args.minutes, time.time_ns() if args.seed is None else args.seed)
    result = {"machine": machine(), **found.result()}
    print(json.dumps(result, indent=1))
    for line in found.wrong[:20]:
        print(line, file=sys.stderr)
    if args.out:
        every = max(1, len(found.samples) // 120)
        rows = [[round(value, 2) for value in sample] for sample in found.samples[::every]]
        result |= {"columns": ["minutes", "api_mib", "engine_mib", "descriptors"], "samples": rows}
        args.out.write_text(json.dumps(result) + "\n")
    return bool(found.wrong)


if __name__ == "__main__":
    sys.exit(main())
