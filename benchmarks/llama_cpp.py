"""llama.cpp for benchmarks/cpu.py: its benchmark program, built from source, and random models for it.

    python benchmarks/llama_cpp.py /tmp/llama.cpp                          # for this processor
    python benchmarks/llama_cpp.py /tmp/llama.cpp --xeon                   # to carry to an x86 server with AVX-512
    python benchmarks/llama_cpp.py /tmp/llama.cpp-amx --xeon --amx

The source is that in the sdist of llama-cpp-python; it takes pip, cmake, a C++ compiler and some ten minutes on two
cores. The folder then has `llama-batched-bench`, llama.cpp's own writer of GGUF files (`gguf`, which needs numpy,
pyyaml and tqdm) and `build.json`, which results quote. With --xeon the program is linked statically.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SDIST = "llama-cpp-python==0.3.36"
PROGRAM = "llama-batched-bench"
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    *(f"-DLLAMA_{part}=OFF" for part in ("OPENSSL", "BUILD_SERVER", "BUILD_APP", "BUILD_TESTS", "BUILD_EXAMPLES")),
)
XEON = (
    "-DGGML_NATIVE=OFF",
    *(f"-DGGML_{part}=ON" for part in ("AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16")),
    "-DCMAKE_EXE_LINKER_FLAGS=-static",
)
AMX = tuple(f"-DGGML_AMX_{part}=ON" for part in ("TILE", "INT8", "BF16"))

_Q4_0, _Q6_K = (32, 18), (256, 210)
"""(weights, bytes) of a block"""
_STEPS = {_Q4_0: 4.61, _Q6_K: 1500.0}
"""standard deviation of a block's random weights before they are multiplied by its scale"""


def build(folder: Path, source: Path | None, flags: tuple[str, ...], jobs: int) -> None:
    """`source`: llama.cpp's folder, where it is not to be downloaded."""
    with tempfile.TemporaryDirectory() as work:
        source = source or _downloaded(Path(work))
        made = Path(work) / "build"
        if "-DCMAKE_EXE_LINKER_FLAGS=-static" in flags:  # which CMake does not look for
            gcc = ["gcc", "-print-file-name=libgomp.a"]
            openmp = subprocess.run(gcc, check=True, capture_output=True, text=True).stdout.strip()
            flags += (f"-DOpenMP_gomp_LIBRARY={openmp}",)
        subprocess.run(["cmake", "-S", source, "-B", made, *flags], check=True)
        subprocess.run(["cmake", "--build", made, f"-j{jobs}", "--target", PROGRAM], check=True)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / "bin" / PROGRAM, folder / PROGRAM)
        subprocess.run(["strip", folder / PROGRAM], check=True)
        shutil.copytree(source / "gguf-py" / "gguf", folder / "gguf", dirs_exist_ok=True)
    about = {"source": SDIST, "flags": [flag for flag in flags if "GGML" in flag]}
    (folder / "build.json").write_text(json.dumps(about, indent=1) + "\n")


def _downloaded(work: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(work), SDIST]
    subprocess.run(pip, check=True)
    (sdist,) = work.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    return next(work.glob("*/vendor/llama.cpp"))


def write_model(folder: Path, shape: dict[str, Any], file: Path) -> int:
    """A GGUF file of random weights as llama.cpp's own quantizer lays out a Q4_0 model: all Linears and the embedding
    in Q4_0, the head in Q6_K; without a vocabulary. `shape`: what config.json says. Returns the bytes that a decoded
    token reads: all but the embedding."""
    sys.path.insert(0, str(folder))
    gguf = importlib.import_module("gguf")
    writer = gguf.GGUFWriter(file, "llama")
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    kinds = {
        _Q4_0: gguf.GGMLQuantizationType.Q4_0,
        _Q6_K: gguf.GGMLQuantizationType.Q6_K,
    }
    total = 0
    found = list(_tensors(shape))
    for name, rows, columns, block in found:
        size: tuple[int, ...] = (columns,) if block is None else (rows, columns // block[0] * block[1])
        stored: np.dtype[Any] = np.dtype(np.float32 if block is None else np.uint8)
        kind = None if block is None else kinds[block]
        num_bytes = int(np.prod(size)) * stored.itemsize
        total += 0 if name == "token_embd.weight" else num_bytes
        writer.add_tensor_info(name, size, stored, num_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for _, rows, columns, block in found:
        norm = np.ones(columns, np.float32)
        writer.write_tensor_data(norm if block is None else _blocks(random, rows, columns, block))
    writer.close()
    return total


def _tensors(shape: dict[str, Any]) -> Iterator[tuple[str, int, int, tuple[int, int] | None]]:
    """(name, rows, columns, kind of block; None: a norm in float32)."""
    hidden, ffn, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    yield "token_embd.weight", vocab, hidden, _Q4_0
    for layer in range(shape["num_hidden_layers"]):
        for norm in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{norm}.weight", 1, hidden, None
        for name, rows, columns in (
            *(("attn_q", hidden, hidden), ("attn_k", kv, hidden), ("attn_v", kv, hidden)),
            *(("attn_output", hidden, hidden), ("ffn_gate", ffn, hidden), ("ffn_up", ffn, hidden)),
            ("ffn_down", hidden, ffn),
        ):
            yield f"blk.{layer}.{name}.weight", rows, columns, _Q4_0
    yield "output_norm.weight", 1, hidden, None
    yield "output.weight", vocab, hidden, _Q6_K


def _blocks(random: np.random.Generator, rows: int, columns: int, block: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Random blocks, with scales by which activations of order 1 stay of order 1."""
    weights, num_bytes = block
    size = (rows, columns // weights, num_bytes)
    words = random.integers(0, 2**64, -(-int(np.prod(size)) // 8), dtype=np.uint64)
    data = words.view(np.uint8)[: int(np.prod(size))].reshape(size)
    scale = np.float16(columns**-0.5 / _STEPS[block]).tobytes()
    at = 0 if block == _Q4_0 else num_bytes - 2
    data[..., at : at + 2] = np.frombuffer(scale, np.uint8)
    return data.reshape(rows, -1)


def decode(folder: Path, model: Path, threads: int, batch: int, prompt: int, new: int) -> float:
    """Tokens per second of all sequences together, behind prompts of `prompt` tokens; nothing is sampled."""
    return float(_rows(folder, model, threads, batch, [prompt], new)[-1]["speed_tg"])


def prefill(folder: Path, model: Path, threads: int, prompt: int, tries: int) -> float:
    """Tokens per second of one prompt, the best of `tries`: the first one finds its buffers cold. Logits are those of
    its last token alone."""
    return max(float(row["speed_pp"]) for row in _rows(folder, model, threads, 1, [prompt] * tries, 1))


def _rows(folder: Path, model: Path, threads: int, batch: int, prompts: list[int], new: int) -> list[dict[str, Any]]:
    options = {
        "-m": model,
        "-c": max(512, batch * (max(prompts) + new)),
        "-npp": ",".join(map(str, prompts)),
        "-ntg": new,
        "-npl": batch,
        "-t": threads,
        "-tb": threads,
        "--output-format": "jsonl",
    }
    words = [str(folder / PROGRAM), *(str(word) for option in options.items() for word in option)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=900)
    rows = [json.loads(line) for line in (done.stdout + "\n" + done.stderr).splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        raise SystemExit(f"{' '.join(words)} left with {done.returncode}: {done.stderr[-2000:]}")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the program goes")
    parser.add_argument("--source", type=Path, help="llama.cpp's folder; default: out of the sdist, downloaded by pip")
    parser.add_argument("--xeon", action="store_true", help="for any x86 server with AVX-512, VNNI and bf16")
    parser.add_argument("--amx", action="store_true", help="with AMX's products of matrices as well")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    build(args.folder, args.source, FLAGS + (XEON if args.xeon else ()) + (AMX if args.amx else ()), args.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
