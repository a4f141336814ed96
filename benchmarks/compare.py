"""Two result files of one benchmark side by side: which figure changed, and by how much.

    python benchmarks/compare.py old.json new.json [--least 2]
    make compare OLD=old.json NEW=new.json

A record is what a benchmark measured of one case. Records match where their texts, their truths and the sizes of the
case (batch, rows, M, ...) are the same; what is left of their numbers is compared. Where a file has one entry per
commit, as those of sampler.py have, FILE@COMMIT says which; otherwise the first one is taken.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIZES = (
    *("batch", "rows", "M", "N", "K", "group_size", "vocab_size", "context", "prompt", "length", "new_tokens"),
    *("streams", "concurrency", "clients", "rate", "temperature", "tokens_each", "constrained"),
)
"""numbers that say which case it is"""
ORIGIN = ("machine", "versions", "gpu", "commit", "date", "seconds", "options", "load")
"""what stands at the top of a file and is no figure"""

Case = tuple[str, ...]


def entry(argument: str) -> Any:
    """The content of FILE or FILE@COMMIT."""
    name, _, commit = argument.partition("@")
    content = json.loads(Path(name).read_text(encoding="utf-8"))
    if not isinstance(content, list):
        return content
    found = [item for item in content if str(item["commit"]).startswith(commit)]
    if not found:
        raise ValueError(f"{name} has no entry of commit {commit}, only {[item['commit'] for item in content]}")
    return found[0]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def figures(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """What was measured, nested percentiles as "ttft_ms.p50"."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= figures(value, f"{prefix}{name}.")
        elif is_number(value) and name not in SIZES:
            found[prefix + name] = float(value)
    return found


def cases(content: dict[str, Any], path: Case = ()) -> Iterator[tuple[Case, dict[str, float]]]:
    """Every record of a file: of its lists, and what stands beside them."""
    beside: dict[str, Any] = {}
    for name, value in content.items():
        if name in ORIGIN:
            continue
        if isinstance(value, list):
            for record in value:
                if isinstance(record, dict):
                    which = [
                        str(text) if isinstance(text, str) else f"{key}={text}"
                        for key, text in record.items()
                        if key in SIZES or (isinstance(text, str | bool) and key != "first_error")
                    ]
                    yield (*path, name, *which), figures(record)
        elif isinstance(value, dict) and any(isinstance(inner, list | dict) for inner in value.values()):
            yield from cases(value, (*path, name))
        else:
            beside[name] = value
    if numbers := figures(beside):
        yield path, numbers


def numbered(records: Iterator[tuple[Case, dict[str, float]]]) -> dict[Case, dict[str, float]]:
    """By case; one that was measured more than once has the number of the time as well."""
    times: Counter[Case] = Counter()
    found: dict[Case, dict[str, float]] = {}
    for case, numbers in records:
        times[case] += 1
        found[case if times[case] == 1 else (*case, f"#{times[case]}")] = numbers
    return found


def ratio(old: float, new: float) -> float:
    return 1.0 if old == new else new / old if old else math.inf


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[float, float, float, str, Case]]:
    """(new / old, old, new, metric, case), the largest change first, up or down."""
    before, after = numbered(cases(old)), numbered(cases(new))
    lines = [
        (ratio(value, after[case][metric]), value, after[case][metric], metric, case)
        for case, numbers in before.items()
        if case in after
        for metric, value in numbers.items()
        if metric in after[case]
    ]
    return sorted(lines, key=lambda line: -abs(math.log(line[0])) if 0 < line[0] < math.inf else -math.inf)


def alone(old: dict[str, Any], new: dict[str, Any]) -> tuple[int, int]:
    """How many cases only the one and only the other has."""
    before, after = numbered(cases(old)), numbered(cases(new))
    return len(before.keys() - after.keys()), len(after.keys() - before.keys())


def origin(content: dict[str, Any]) -> str:
    """Machine and commit of a file, or of the first part of one that has several."""
    part = content if "machine" in content else next((v for v in content.values() if isinstance(v, dict)), {})
    machine = part.get("machine") or {}
    names = (machine.get("gpu") or machine.get("name") or machine.get("cpu"), part.get("commit", machine.get("commit")))
    return ", ".join(str(name) for name in names if name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--least", type=float, default=0.0, help="smallest change that is printed, percent")
    args = parser.parse_args()
    try:
        old, new = entry(args.old), entry(args.new)
    except (OSError, ValueError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 1
    print(f"old: {origin(old)}\nnew: {origin(new)}")
    lines = compare(old, new)
    if not lines:
        print("compare.py: the files have no case in common", file=sys.stderr)
        return 1
    for change, before, after, metric, case in lines:
        if change != 1 and abs(change - 1) * 100 >= args.least:
            print(f"{change:8.3f}  {before:>12.6g} -> {after:<12.6g} {metric:24} {' '.join(case)}")
    print("\nmedian ratio and number of cases of each figure:")
    metrics = dict.fromkeys(metric for _, _, _, metric, _ in lines)
    for name in metrics:
        ratios = [change for change, _, _, metric, _ in lines if metric == name]
        print(f"{statistics.median(ratios):8.3f}  {len(ratios):4}  {name}")
    only_old, only_new = alone(old, new)
    print(f"only in old: {only_old} cases, only in new: {only_new}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, as it ends any filter
    sys.exit(main())
