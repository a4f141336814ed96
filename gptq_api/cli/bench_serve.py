"""`gptq-api bench serve`: load a running OpenAI server and say what its users feel."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table
from rich.text import Text

from gptq_api import __version__, exits
from gptq_api.bench.http_client import Endpoint, LoadError, TimedCall
from gptq_api.bench.load import CallsBar, Traffic, closed_loop, open_loop, summary
from gptq_api.cli.output import fail, table_console
from gptq_api.config import BenchServeSettings
from gptq_api.errors import UserError, writing

_COLUMNS = ("load", "requests", "failed", "tokens/s", "requests/s", "first token ms", "between tokens ms", "whole s")
_TIMES = (("first token, ms: p50, p90, p99", "ttft_ms"), ("between tokens, ms: p50, p90, p99", "inter_token_ms"))
_TOKENS = 128
_BUSY = 0.8
"""the share of a core from which the client measures itself"""


def run(settings: BenchServeSettings) -> int:
    """Exit status: 0 measured, 1 nothing could be, or requests failed (a sentence on stderr), 130 stopped by ^C."""
    try:
        _check_outputs(settings)
        result = asyncio.run(measure(settings))
        _report(settings, result)
    except UserError as error:
        fail("bench serve", error)
        return exits.FAILED
    except KeyboardInterrupt:
        print("\ngptq-api bench serve: stopped", file=sys.stderr)
        return exits.INTERRUPTED
    failed = [row for row in result["rows"] if row["failed"]]
    if failed:
        count = sum(row["failed"] for row in failed)
        fail("bench serve", f"{count} requests failed; the first one: {failed[0]['first_error']}")
        return exits.FAILED
    return exits.DONE


async def measure(settings: BenchServeSettings) -> dict[str, Any]:
    """The result as JSON values, a row for each number of users and each rate. Raises LoadError."""
    endpoint = Endpoint(settings.url.rstrip("/"), settings.api_key[0] if settings.api_key else None)
    listed = (await endpoint.json("GET", "/models")).get("data") or []
    entry = next((m for m in listed if settings.model is None or m.get("id") == settings.model), None)
    if entry is None and settings.model is None:
        raise LoadError(f"{settings.url} lists no models; name one with --model")
    shape = Traffic(
        model=settings.model or str(entry and entry["id"]),
        lengths=settings.chosen_lengths,
        prompt_tokens=settings.prompt_tokens or _TOKENS,
        max_tokens=settings.max_tokens or _TOKENS,
        temperature=settings.temperature,
        seed=settings.seed,
        longest=entry.get("max_model_len") if entry is not None else None,
    )
    await shape.probe(endpoint)
    rows = []
    for users in settings.concurrency or ([] if settings.rate else [1, 8, 64]):
        bodies = shape.bodies(settings.num_requests or max(32, 2 * users))
        progress = CallsBar(f"{users} users", len(bodies))
        row = {"mode": "closed", "concurrency": users}
        rows.append(row | await _timed(closed_loop(endpoint, bodies, users, progress)))
    for rate in settings.rate:
        bodies = shape.bodies(settings.num_requests or 64)
        progress = CallsBar(f"{rate:g} requests/s", len(bodies))
        row = {"mode": "open", "rate": rate}
        rows.append(row | await _timed(open_loop(endpoint, bodies, rate, settings.seed, progress)))
    load = {"lengths": shape.lengths, "temperature": settings.temperature, "seed": settings.seed}
    if shape.lengths == "fixed":
        load |= {"prompt_tokens": shape.prompt_tokens, "max_tokens": shape.max_tokens}
    return {
        "url": settings.url,
        "model": shape.model,
        "load": load | {"ignore_eos": shape.ignores_end},
        "client": client_machine(),
        "rows": rows,
    }


async def _timed(loop: Any) -> dict[str, Any]:
    began = time.process_time()
    calls, elapsed = await loop
    found: list[TimedCall] = calls
    return summary(found, elapsed) | {"client_share_of_a_core": round((time.process_time() - began) / elapsed, 2)}


def client_machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line[:10] == "model name"]
        name = models[0] if models else name
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "gptq_api": __version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def name_of(row: dict[str, Any]) -> str:
    return f"{row['concurrency']} users" if row["mode"] == "closed" else f"{row['rate']:g} requests/s"


def _check_outputs(settings: BenchServeSettings) -> None:
    for file in (settings.json_file, settings.png):
        if file is not None and (not file.absolute().parent.is_dir() or file.is_dir()):
            raise LoadError(f"{file} cannot be written: name a file in a folder that is there")
    if settings.png is not None and importlib.util.find_spec("matplotlib") is None:
        raise LoadError("--png needs matplotlib: pip install 'gptq-api[bench]', or leave the option out")


def _report(settings: BenchServeSettings, result: dict[str, Any]) -> None:
    console = table_console()
    table = Table(
        "load", "requests", "failed", "tokens/s", "requests/s", "first token ms", "between tokens ms", "whole s"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for row in result["rows"]:
        ttft, gaps, whole = (row[name] for name in ("ttft_ms", "inter_token_ms", "e2e_ms"))
        cells = [name_of(row), row["requests"], row["failed"], row["output_tokens_per_s"], row["requests_per_s"]]
        cells += [" / ".join(f"{found.get(p, 0):.4g}" for p in ("p50", "p90", "p99")) for found in (ttft, gaps)]
        table.add_row(*(Text(str(cell)) for cell in cells), Text(f"{whole.get('p50', 0) / 1e3:.3g}"))
    console.print(table)
    for note in notes(result):
        console.print(note, soft_wrap=True)
    if settings.json_file is not None:
        with writing(settings.json_file):
            settings.json_file.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    if settings.png is not None:
        with writing(settings.png):
            _chart(result, settings.png)


def notes(result: dict[str, Any]) -> list[str]:
    """Sentences below the table."""
    load, client = result["load"], result["client"]
    first = result["rows"][0]
    good = max(1, first["requests"] - first["failed"])
    drawn = "lengths like ShareGPT's" if load["lengths"] == "sharegpt" else "fixed lengths"
    said = [
        f"{result['model']} at {result['url']}, {drawn}: {first['prompt_tokens'] / good:.0f} tokens of prompt and "
        f"{first['output_tokens'] / good:.0f} of answer on average in the first row; times are p50 / p90 / p99",
        f"measured from {client['cpu']}, {client['cores']} cores, {client['date']}",
    ]
    if not load["ignore_eos"]:
        said.append("the server does not know ignore_eos, so that answers may be shorter than they were drawn")
    busy = [name_of(row) for row in result["rows"] if row["client_share_of_a_core"] > _BUSY]
    if busy:
        said.append(f"with {', '.join(busy)} the client itself was busy: these rows are its limit, or near it")
    return said


def _chart(result: dict[str, Any], file: Path) -> None:
    """Tokens a second, first token and time between tokens, a group of bars for each row."""
    from matplotlib.figure import Figure

    rows, client = result["rows"], result["client"]
    figure = Figure(figsize=(12.5, 2.2 + 0.45 * len(rows)), layout="constrained")
    names = [name_of(row) for row in rows]
    quantities = (
        ("tokens/s", None),
        ("first token, ms: p50, p90, p99", "ttft_ms"),
        ("between tokens, ms", "inter_token_ms"),
    )
    for i, (title, key) in enumerate(quantities, 1):
        axes = figure.add_subplot(1, 3, i)
        if key is None:
            bars = axes.barh(range(len(rows)), [row["output_tokens_per_s"] for row in rows])
            axes.bar_label(bars, padding=3)
        else:
            for offset, (p, shade) in enumerate((("p50", "C0"), ("p90", "C9"), ("p99", "0.7"))):
                at = [k + (offset - 1) * 0.27 for k in range(len(rows))]
                bars = axes.barh(at, [row[key].get(p, 0.0) for row in rows], height=0.25, color=shade)
                axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=7)
        axes.set_yticks(range(len(rows)), names if i == 1 else [])
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.margins(x=0.25)
        axes.set_title(title)
    figure.suptitle(f"{result['model']} at {result['url']}, {client['date']}, from {client['cpu']}", fontsize=9)
    figure.savefig(file, dpi=150, format="png")
