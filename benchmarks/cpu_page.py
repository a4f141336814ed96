"""What README.md and docs/measurements.md say of benchmarks/cpu.py's results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pages import MEASUREMENTS, README, Part

RESULTS = Path(__file__).parent / "results"
SENTENCE, TABLES = (Part(page, "cpu", "benchmarks/cpu.py") for page in (README, MEASUREMENTS))
_OTHER = re.compile(r"llama_cpp_(\w+)_tok_s")
"""a figure of a second build"""


def _about(result: dict[str, Any]) -> str:
    """ "2 threads of AMD EPYC" """
    cpu = result["machine"]
    shared = "" if cpu["threads"] == cpu["cores"] else f" ({cpu['cores']} cores)"
    return f"{cpu['threads']} threads{shared} of {cpu['cpu']}"


def table(shape: str, result: dict[str, Any]) -> str:
    """Of one shape, with llama.cpp's columns where it was measured."""
    beside = any("llama_cpp_tok_s" in row for row in result["rows"])
    columns = ["tok/s", "of the bandwidth", *(["llama.cpp", "of the bandwidth", "ratio"] if beside else [])]
    others = sorted({found[1] for row in result["rows"] for key in row if (found := _OTHER.fullmatch(key))})
    columns += [column for other in others for column in (f"llama.cpp, {other}", "ratio")]
    lines = [
        f"{shape} on {_about(result)}, which read {result['read_gb_s']['huge_pages']:.1f} GB/s; {result['date']}, "
        f"commit {result['commit']}:",
        "",
        f"| | {' | '.join(columns)} |",
        f"|{'---|' * (len(columns) + 1)}",
    ]
    for row in result["rows"]:
        if "seconds" in row:
            cells = [f"{row['seconds']:.2f} s"] + [""] * (len(columns) - 1)
            name = f"{row['what']}, the {row['time']} time"
        else:
            name = f"prefill of {row['prompt']}" if row["what"] == "prefill" else f"decode, batch {row['batch']}"
            cells = [f"{row['tok_s']:.1f}", _share(row, "share_of_bandwidth")]
            if beside:
                cells += [f"{row['llama_cpp_tok_s']:.1f}", _share(row, "llama_cpp_share_of_bandwidth")]
                cells += [f"{row['llama_cpp_ratio']:.2f}"]
            for other in others:
                cells += [f"{row[f'llama_cpp_{other}_tok_s']:.1f}", f"{row[f'llama_cpp_{other}_ratio']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _share(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.0%}" if row.get(key) is not None else ""


def _results() -> list[dict[str, Any]]:
    """By shape, of each processor; the latest one first."""
    files = [json.loads(file.read_text(encoding="utf-8")) for file in RESULTS.glob("cpu-*.json")]
    return sorted(files, key=lambda shapes: max(result["date"] for result in shapes.values()), reverse=True)


def tables() -> str:
    """For docs/measurements.md."""
    return "\n".join(table(shape, result) for shapes in _results() for shape, result in shapes.items())


def sentence() -> str:
    """For README.md: decoding alone, a line for each processor; empty where nothing has been measured."""
    return "".join(_line(shapes) for shapes in _results())


def _line(shapes: dict[str, Any]) -> str:
    parts: list[str] = []
    for shape, result in shapes.items():
        row = next(row for row in result["rows"] if row["what"] == "decode" and row["batch"] == 1)
        theirs = "llama.cpp's Q4_0: " if not parts else ""
        beside = f" ({theirs}{row['llama_cpp_tok_s']:.1f})" if "llama_cpp_tok_s" in row else ""
        parts.append(f"{row['tok_s']:.1f} tokens a second of {_named(shape)}{beside}")
    about = _about(next(iter(shapes.values())))
    return f"* **On {about}** one user gets {' and '.join(parts)}, over HTTP.\n"


def _named(shape: str) -> str:
    """ "a 1.1B" of "tinyllama-1.1b" """
    return f"a {shape.rpartition('-')[2].upper()}"
