"""`gptq-api bench`: memory, perplexity and speed of GPTQ checkpoints beside the unquantized model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table
from rich.text import Text

from gptq_api import __version__, exits
from gptq_api.bench.row import EXIT_NO_ROOM, EXIT_TOLD, Job, Kind, Row, TooLargeError
from gptq_api.checkpoint.files import candidates
from gptq_api.cli.output import fail, table_console
from gptq_api.config import BenchSettings
from gptq_api.errors import UserError, writing
from gptq_api.hub import is_hub_name, local_model
from gptq_api.text.folder import checkpoint_folder

_COLUMNS = ("model", "bits", "group", "act-order", "weights MiB", "peak MiB", "perplexity", "s/token", "speed-up")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
_SMALL_BYTES = 64 * 2**20


class BenchError(UserError):
    """One sentence for the user."""


def run(settings: BenchSettings) -> int:
    """Measure and print. Exit status: 0 measured, 1 a model could not be (a sentence on stderr), 130 stopped by ^C."""
    try:
        _check_outputs(settings)
        _report(settings, _measure_all(_jobs(settings)))
    except UserError as error:
        fail("bench", error)
        return exits.FAILED
    except KeyboardInterrupt:
        print("\ngptq-api bench: stopped", file=sys.stderr)
        return exits.INTERRUPTED
    return exits.DONE


def _report(settings: BenchSettings, rows: list[Row]) -> None:
    console = table_console()
    console.print(_table(rows))
    for note in _notes(rows, settings):
        console.print(note, soft_wrap=True)
    if settings.json_file is not None:
        report = {"machine": _machine(rows[0]), "rows": [as_json(row, rows[0]) for row in rows]}
        with writing(settings.json_file):
            settings.json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    if settings.png is not None:
        with writing(settings.png):
            _chart(rows, settings.png)


def _check_outputs(settings: BenchSettings) -> None:
    """Told now and not after minutes of measuring."""
    for file in (settings.json_file, settings.png):
        if file is not None and not file.absolute().parent.is_dir():
            raise BenchError(f"{file} cannot be written: {file.parent} is no folder")
        if file is not None and file.is_dir():
            raise BenchError(f"{file} cannot be written: it is a folder; name a file")
    if settings.png is not None and importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--png needs matplotlib: pip install 'gptq-api[bench]', or leave the option out")
    if settings.text is not None and not settings.text.is_file():
        raise BenchError(f"--text {settings.text} is no file")


def _jobs(settings: BenchSettings) -> list[Job]:
    """The unquantized model first."""
    return _synthetic_jobs(settings) if settings.synthetic is not None else _model_jobs(settings)


def _synthetic_jobs(settings: BenchSettings) -> list[Job]:
    """The rows of GPTQ-for-LLaMa's own table."""
    model = settings.synthetic

    def job(name: str, kind: Kind, group_size: int = 128, act_order: bool = False) -> Job:
        return Job(
            name=f"{model} {name}",
            folder="",
            kind=kind,
            ckpt=None,
            text=None,
            context=None,
            num_windows=None,
            prompt_tokens=settings.prompt_tokens,
            num_tokens=settings.num_tokens,
            device=settings.device,
            dtype=settings.dtype,
            num_threads=settings.num_threads or len(os.sched_getaffinity(0)),
            synthetic=model,
            group_size=group_size,
            act_order=act_order,
            kv_cache_dtype=settings.kv_cache_dtype,
            batches=settings.batch or None,
            repeats=settings.repeats,
        )

    return [
        job("random", "dense"),
        job("g128 act-order", "gptq", act_order=True),
        job("g128", "gptq"),
        job("g-1", "gptq", group_size=-1),
    ]


def _model_jobs(settings: BenchSettings) -> list[Job]:
    folders: dict[str, Path] = {}
    none_on_hub = not any(map(is_hub_name, settings.models))
    for model in settings.models:
        on_hub = is_hub_name(model)
        revision = settings.revision if on_hub or none_on_hub else None
        local = local_model(model, revision, settings.gptq_ckpt)
        folder = checkpoint_folder(local)
        candidates(folder if model == "demo" else Path(local), settings.gptq_ckpt)  # told before anything is measured
        name = model if on_hub or model == "demo" else folder.resolve().name
        while name in folders:
            name += "'"
        folders[name] = folder if Path(local).is_dir() or model == "demo" else Path(local)
    first, folder = next(iter(folders.items()))

    def job(name: str, folder: Path, kind: Kind) -> Job:
        return Job(
            name=name,
            folder=str(folder),
            kind=kind,
            ckpt=None if settings.gptq_ckpt is None else str(settings.gptq_ckpt),
            text=None if settings.text is None else str(settings.text),
            context=settings.context,
            num_windows=settings.num_windows,
            prompt_tokens=settings.prompt_tokens,
            num_tokens=settings.num_tokens,
            device=settings.device,
            dtype=settings.dtype,
            num_threads=settings.num_threads or _default_threads(next(iter(folders.values()))),
            kv_cache_dtype=settings.kv_cache_dtype,
            batches=settings.batch or None,
            repeats=settings.repeats,
        )

    if settings.fp16 is not None:
        reference = job(settings.fp16.resolve().name, settings.fp16, "dense")
    else:
        reference = job(first, folder, "dequantized")
    return [reference, *(job(name, folder, "gptq") for name, folder in folders.items())]


def _default_threads(model: Path) -> int:
    """What the server takes for the first checkpoint, for all rows: one thread where a step is milliseconds."""
    files = [model] if model.is_file() else [file for file in model.iterdir() if file.suffix in _WEIGHTS]
    small = sum(file.stat().st_size for file in files) < _SMALL_BYTES
    return 1 if small else len(os.sched_getaffinity(0))


def _measure_all(jobs: list[Job]) -> list[Row]:
    """Without an unquantized model of random weights that memory does not hold, which is said."""
    rows = []
    for job in jobs:
        try:
            rows.append(_measure(job))
        except TooLargeError as error:
            if job.kind != "dense":
                raise
            print(f"{error}; it is left out, and speed-ups are over the next one", file=sys.stderr)
    return rows


def _measure(job: Job) -> Row:
    print(f"measuring {job.name} ({job.kind})", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "gptq_api.bench.measure"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(msgspec.json.encode(job))
    finally:
        process.kill()  # where ^C came in between
    if process.returncode != 0:
        told = err.decode(errors="replace").strip()
        if process.returncode not in (EXIT_TOLD, EXIT_NO_ROOM):  # a bug of ours, or a signal
            print(told, file=sys.stderr)
            raise BenchError(f"{job.name}: the process that measured it left with {process.returncode}")
        last = told.splitlines()[-1]
        kind = TooLargeError if process.returncode == EXIT_NO_ROOM else BenchError
        raise kind(f"{job.name}: {last}" if job.name not in last else last)
    return msgspec.json.decode(out, type=Row)


def as_json(row: Row, reference: Row) -> dict[str, Any]:
    by_batch = {str(batch): ratio for batch, ratio in _ratios(row, reference).items()}
    return {**msgspec.to_builtins(row), "speed_up": speed_up(row, reference), "speed_up_by_batch": by_batch}


def speed_up(row: Row, reference: Row) -> float | None:
    """None where the two are not the same model in size."""
    return reference.seconds_per_token / row.seconds_per_token if row.shape == reference.shape else None


def _ratios(row: Row, reference: Row) -> dict[int, float]:
    """By batch: how many times as fast as the reference, where both were measured and are of one size."""
    if row.shape != reference.shape:
        return {}
    theirs = {found.batch: found.seconds_per_step for found in reference.decoding}
    return {d.batch: theirs[d.batch] / d.seconds_per_step for d in row.decoding if d.batch in theirs}


def _label(row: Row) -> str:
    if row.kind == "gptq":
        return row.name
    return f"{row.name} ({'unquantized' if row.kind == 'dense' else 'dequantized'}, {row.dtype})"


def _cells(row: Row, reference: Row, batches: list[int]) -> list[str]:
    faster = speed_up(row, reference)
    return [
        _label(row),
        "/".join(map(str, row.bits)) or ("32" if row.dtype == "float32" else "16"),
        "/".join(map(str, row.group_sizes)) or "-",
        row.act_order if row.kind == "gptq" else "-",
        f"{row.weights_mib:.1f}",
        f"{row.peak_mib:.0f}",
        "-" if row.perplexity is None else f"{row.perplexity:.4f}",
        f"{row.seconds_per_token:.6f}",
        "-" if faster is None else f"{faster:.2f}x",
        f"{row.decoding[0].spread:.1%}",
        *(_at(row, reference, batch) for batch in batches[1:]),
    ]


def _at(row: Row, reference: Row, batch: int) -> str:
    """Tokens a second of a batch, and how many times the reference's that is."""
    rate = _rate(row, batch)
    if rate is None:
        return "-"
    ratio = _ratios(row, reference).get(batch)
    return f"{rate:,.0f}" + (f" ({ratio:.2f}x)" if ratio is not None else "")


def _batches_of(rows: list[Row]) -> list[int]:
    return sorted({decoding.batch for row in rows for decoding in row.decoding})


def _table(rows: list[Row]) -> Table:
    more = [f"tokens/s x {batch}" for batch in _batches_of(rows)[1:]]
    table = Table(*_COLUMNS, "spread", *more)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*map(Text, _cells(row, rows[0], _batches_of(rows))))  # a name may look like markup
    return table


def _notes(rows: list[Row], settings: BenchSettings) -> list[str]:
    first = rows[0]
    machine = f"the CPU, threads: {first.threads}" if first.device == "cpu" else first.device
    notes = [
        f"on {machine}, activations {'/'.join(dict.fromkeys(row.dtype for row in rows))}; s/token: median of "
        f"{first.decoded_tokens} tokens at batch {first.decoding[0].batch} after {first.context_tokens}, in "
        f"{first.repeats} repeats; spread: how far the repeats' medians are apart",
        _machine_line(first),
    ]
    left_out = [_label(row) for row in rows if len(row.decoding) < len(_batches_of(rows))]
    if left_out:
        notes.append(f"-: a batch that would take {', '.join(left_out)} more than a minute; --batch measures it")
    if first.kind == "dequantized":
        notes.append(
            f"the first row is {first.name} itself with its weights dequantized at load, so its perplexity is that of "
            "the quantized weights; --fp16 FOLDER measures the original"
        )
    if first.perplexity is not None and settings.text is not None:
        notes.append(
            f"perplexity: {first.perplexity_tokens} tokens of {settings.text.name} in windows of {first.window}"
        )
    return notes


def _machine_line(row: Row) -> str:
    found = _machine(row)
    return f"measured on {found['cpu']}, {found['cores']} cores, torch {found['torch']}, {found['date']}"


def _machine(row: Row) -> dict[str, Any]:
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "device": row.device,
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "gptq_api": __version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _rate(row: Row, batch: int) -> float | None:
    return next((decoding.tokens_per_s for decoding in row.decoding if decoding.batch == batch), None)


def _chart(rows: list[Row], file: Path) -> None:
    """Bars of memory, time and, where it was measured, perplexity; the numbers stand on them."""
    from matplotlib.figure import Figure

    quantities: list[tuple[str, list[float | None], str]] = [
        ("weights, MiB", [row.weights_mib for row in rows], "{:.0f}"),
        ("median ms/token, batch 1", [1000 * row.seconds_per_token for row in rows], "{:.3f}"),
        *((f"tokens/s, batch {b}", [_rate(row, b) for row in rows], "{:.0f}") for b in _batches_of(rows)[1:]),
    ]
    if any(row.perplexity is not None for row in rows):
        quantities.append(("perplexity", [row.perplexity for row in rows], "{:.3f}"))
    figure = Figure(figsize=(4.2 * len(quantities), 1.6 + 0.5 * len(rows)), layout="constrained")
    for i, (title, values, form) in enumerate(quantities):
        axes = figure.add_subplot(1, len(quantities), i + 1)
        bars = axes.barh(range(len(rows)), [value or 0.0 for value in values], color=["0.6"] + ["C0"] * (len(rows) - 1))
        axes.bar_label(bars, ["-" if value is None else form.format(value) for value in values], padding=3)
        axes.set_yticks(range(len(rows)), [_label(row) for row in rows] if i == 0 else [])
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.margins(x=0.35)
        axes.set_title(title)
    figure.suptitle(f"{_machine_line(rows[0])}; {rows[0].repeats} repeats", fontsize=9)
    figure.savefig(file, dpi=150, format="png")
