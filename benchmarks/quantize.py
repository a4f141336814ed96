"""How long `gptq-api quantize` takes on this machine, with random weights in the shape of a known model.

    python benchmarks/quantize.py --synthetic llama-7b --out benchmarks/results               # the whole model
    python benchmarks/quantize.py --synthetic llama-7b --layers 4 --out benchmarks/results    # a part of it

The command itself is run, reading and writing files, with random words as calibration text. Layers are alike, so a part
of the model tells what a layer takes; the result says how many there were.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from gpu_timing import machine

from gptq_api.bench.synthetic import SHAPES, write_folder
from gptq_api.cli import quantize
from gptq_api.config import QuantizeSettings


def calibration(file: Path, num_samples: int, length: int) -> Path:
    """One document per sample, each longer than `length` tokens."""
    source = random.Random(0)
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 9))) for _ in range(4000)]
    lines = [json.dumps({"text": " ".join(source.choices(words, k=length))}) for _ in range(num_samples)]
    file.write_text("\n".join(lines) + "\n")
    return file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthetic", choices=sorted(SHAPES), default="llama-7b")
    parser.add_argument("--layers", type=int, help="only so many; default: all of the model's")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--sample-length", type=int, default=2048)
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--commit", help="what was measured, where there is no git")
    parser.add_argument("--out", type=Path, help="folder for quantize-<gpu>.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no benchmark: torch finds no CUDA device")
    whole = SHAPES[args.synthetic]
    layers = args.layers or whole["num_hidden_layers"]
    name = f"{args.synthetic} with {layers} layers"
    SHAPES[name] = {**whole, "num_hidden_layers": layers}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_folder(name, folder / "fp16", dense=True)
        text = calibration(folder / "words.jsonl", args.num_samples + 64, args.sample_length)
        torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        status = quantize.run(
            QuantizeSettings(
                model_path=str(folder / "fp16"),
                out=folder / "gptq",
                calibration=text,
                num_samples=args.num_samples,
                sample_length=args.sample_length,
                act_order=args.act_order,
                device="cuda",
            )
        )
        seconds = time.monotonic() - started
    if status:
        return status
    result = machine(args.commit) | {
        "date": datetime.now(UTC).date().isoformat(),
        "model": args.synthetic,
        "layers": layers,
        "layers_of_the_model": whole["num_hidden_layers"],
        "num_samples": args.num_samples,
        "sample_length": args.sample_length,
        "act_order": args.act_order,
        "seconds": round(seconds, 1),
        "seconds_per_layer": round(seconds / layers, 2),
        "peak_mib": torch.cuda.max_memory_allocated() >> 20,
    }
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"quantize-{result['gpu'].lower().replace(' ', '-')}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
