"""The output head on this GPU, float32 logits of weights in 16 bits: our kernel beside torch.mm, which is cuBLAS, and
beside the same weights rounded to 8 bits (--lm-head-bits 8).

    python benchmarks/head.py --out benchmarks/results            # four heads, both types, a minute
    python benchmarks/head.py --quick                             # two heads in fp16, four batch sizes
    python benchmarks/head.py --quick --tiles                     # and every tile, to choose between them

Method as in gemm.py: weights rotate over more than 1 GB, so that none is in the L2 when its turn comes; each figure is
the median over replays of a CUDA graph; ours and cuBLAS take turns, with pauses between. `fraction_of_floor` is the
time that the bytes (at the copy ceiling) or the products (at the rate cuBLAS reaches on 8192^3) must take, whichever is
longer, over the time taken.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Clock, ceilings, in_turns, machine
from torch import Tensor

from gptq_api.kernels import extension, gemm
from gptq_api.kernels.head import head
from gptq_api.kernels.layout import PackedLinear
from gptq_api.kernels.planes import pack_head

SHAPES = ((32000, 5120), (32000, 4096), (128256, 4096), (128256, 8192))
"""V, H of LLaMA 13B, 7B, Llama-3 8B, 70B"""
QUICK_SHAPES = ((32000, 5120), (128256, 4096))
ALL_M = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUICK_M = (1, 8, 64, 256)
TILES = {"head": (8, 16, 32, 64, 128), "head_wgmma": (8, 16, 32, 64, 128, 192, 256)}
"""tokens"""
ROTATE_BYTES = 1_200_000_000
GRAPH_US = 15_000


def by_tile(kernel: str, tokens: int, x: Tensor, weight: Tensor, out: Tensor) -> None:
    (size, width), stream = weight.shape, torch.cuda.current_stream().cuda_stream
    addresses = (weight.data_ptr(), x.data_ptr(), out.data_ptr())
    strides = (x.stride(0), out.stride(0))
    product = getattr(extension.cuda, kernel)
    product(*addresses, len(x), size, width, *strides, x.dtype == torch.bfloat16, tokens, stream)


class Bench:
    def __init__(self) -> None:
        self.clock = Clock()
        self.copy_tb_s, self.peak_tflops = ceilings()
        self.records: list[dict[str, Any]] = []

    def shape(self, size: int, width: int, dtype: torch.dtype, ms: tuple[int, ...], tiles: bool) -> None:
        copies = max(2, -(-ROTATE_BYTES // (2 * size * width)))
        weights = torch.randn(copies, size, width, device="cuda", dtype=dtype).mul_(width**-0.5)
        rounded = [pack_head(weight, "cuda") for weight in weights]
        for m in ms:
            x, out = torch.randn(m, width, device="cuda", dtype=dtype), torch.empty(m, size, device="cuda")
            theirs = torch.empty_like(out)
            floor = max(weights[0].nbytes / self.copy_tb_s, 2.0 * m * size * width / self.peak_tflops) / 1e6
            count = max(2, min(copies, int(GRAPH_US / floor)))

            def rotated(one: Callable[[Any], Any], count: int = count, of: Sequence[Any] = tuple(weights)) -> None:
                for i in range(count):
                    one(of[i % copies])

            def cublas(weight: Tensor, x: Tensor = x, out: Tensor = theirs) -> None:
                torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)

            def ours(weight: Tensor, x: Tensor = x, out: Tensor = out) -> None:
                head(x, weight, out)

            def of_8_bits(weight: PackedLinear, x: Tensor = x, out: Tensor = out) -> None:
                gemm.gemm(x, weight, out, same_bits=True)

            names = [(kernel, t) for kernel in TILES if hasattr(extension.cuda, kernel) for t in TILES[kernel]]
            names = [(kernel, t) for kernel, t in names if tiles and (kernel == "head" or self.hopper)]
            jobs: list[tuple[Callable[[], None], int]] = [(partial(rotated, ours), count)]
            jobs += [(partial(rotated, cublas), count), (partial(rotated, of_8_bits, of=rounded), count)]
            for kernel, tokens in names:

                def tile(
                    weight: Tensor,
                    x: Tensor = x,
                    kernel: str = kernel,
                    tokens: int = tokens,
                    out: Tensor = out,
                ) -> None:
                    by_tile(kernel, tokens, x, weight, out)

                jobs.append((partial(rotated, tile), count))
            self.clock.settle()
            us, cublas_us, int8_us, *of_tiles = in_turns(jobs)
            record: dict[str, Any] = {"V": size, "H": width, "M": m, "dtype": str(dtype).removeprefix("torch.")}
            record |= {"us": round(us, 2), "cublas_us": round(cublas_us, 2), "speedup": round(cublas_us / us, 3)}
            record |= {"int8_us": round(int8_us, 2), "int8_speedup": round(us / int8_us, 3)}
            record |= {"tb_s": round(weights[0].nbytes / us / 1e6, 3)}
            record |= {"tflops": round(2.0 * m * size * width / us / 1e6, 1)}
            record |= {"fraction_of_floor": round(floor / us, 4), "sm_mhz": round(self.clock.read())}
            if names:
                record["tiles_us"] = {
                    f"{kernel} {tokens}": round(one, 2) for (kernel, tokens), one in zip(names, of_tiles, strict=True)
                }
            self.records.append(record)
            print(json.dumps(record), flush=True)

    @property
    def hopper(self) -> bool:
        return torch.cuda.get_device_capability() == (9, 0)

    def save(self, folder: Path, commit: str | None, began: float) -> None:
        ceilings = {"copy_tb_s": round(self.copy_tb_s, 3), "cublas_tflops": round(self.peak_tflops, 1)}
        result = machine(commit) | ceilings | {"seconds": round(time.monotonic() - began, 1), "records": self.records}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"head-{result['gpu'].lower().replace(' ', '-')}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{path.name}: {len(self.records)} records after {result['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="two heads in fp16, four batch sizes")
    parser.add_argument("--tiles", action="store_true", help="every tile of every kernel as well")
    parser.add_argument("--commit", help="what was measured, where there is no git")
    parser.add_argument("--out", type=Path, help="folder for the .json")
    options = parser.parse_args()
    if (reason := gemm.unavailable_reason()) is not None:
        sys.exit(f"no benchmark: {reason}")
    began, bench = time.monotonic(), Bench()
    print(f"copy {bench.copy_tb_s:.2f} TB/s, cuBLAS 8192^3 {bench.peak_tflops:.0f} TFLOP/s", flush=True)
    for dtype in (torch.float16,) if options.quick else (torch.float16, torch.bfloat16):
        for size, width in QUICK_SHAPES if options.quick else SHAPES:
            bench.shape(size, width, dtype, QUICK_M if options.quick else ALL_M, options.tiles)
            if options.out is not None:
                bench.save(options.out, options.commit, began)


if __name__ == "__main__":
    main()
