"""The 4-bit GEMM on this GPU: every linear of LLaMA 7B, 13B, Llama-3 8B and 70B and an 8192x8192 one, M from 1 to 4096,
beside cuBLAS fp16, torch's int4 product and the copy ceiling of the same run; isolated and as the four GEMMs of a layer
in a row.

    python benchmarks/gemm.py --out benchmarks/results            # everything, a few minutes
    python benchmarks/gemm.py --quick                             # 13B alone, a few M
    python benchmarks/gemm.py --chains                            # the GEMMs of a layer in a row alone, of 7B and 13B
    python benchmarks/gemm.py --draw benchmarks/results/gemm-nvidia-h200.json

Method: random data; weights rotate over more than 1 GB, so that none is in the L2 when its turn comes; each figure is
the median over replays of a CUDA graph with one call per copy of the weight (fewer where a call takes longer than a
millisecond); ours, asymmetric and act-order, and cuBLAS take turns with pauses between, since a chip that has just run
hot clocks lower: a 13B layer of one token takes 48 us at 1.96 GHz and 56 at 1.42, where large products leave the chip.
So few tokens come first, and up to 128 wait until the clock is back; `sm_mhz` is the clock right after the timing.
`fraction_of_floor` is the time the bytes (at the copy ceiling) or the products (at the rate cuBLAS reaches on 8192^3)
must take, whichever is longer, over the time taken.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Clock, ceilings, in_turns, machine
from torch import Tensor

from gptq_api.kernels import gemm
from gptq_api.kernels.layout import PackedLinear, chunk_bytes

LINEARS: dict[str, dict[str, tuple[int, int]]] = {
    "7B": {"qkv": (4096, 12288), "o": (4096, 4096), "gate_up": (4096, 22016), "down": (11008, 4096)},
    "13B": {"qkv": (5120, 15360), "o": (5120, 5120), "gate_up": (5120, 27648), "down": (13824, 5120)},
    "3-8B": {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)},
    "70B": {"qkv": (8192, 10240), "o": (8192, 8192), "gate_up": (8192, 57344), "down": (28672, 8192)},
    "square": {"8192": (8192, 8192)},
}
ALL_M = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
QUICK_M = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
VARIANT_M = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
CHAIN_M = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
COOL_M = 128
CHAIN_LAYERS = 8
ROTATE_BYTES = 1_200_000_000
TORCH_INT4_M = (1, 8, 16, 32)
"""beyond, torch's int4 product takes several times what its fp16 one takes"""
OTHERS = {"vllm": "its Marlin and Machete ops", "gptqmodel": "its Marlin and exllama kernels"}


def random_weight(
    k: int, n: int, group_size: int, *, asym: bool = False, act_order: bool = False, paired: bool = False
) -> PackedLinear:
    """Any bytes are a weight; only scales and zero points must be sensible. Unit inputs give outputs of order 1."""
    chunks, size = -(-k // 128), chunk_bytes(group_size, asym)
    data = torch.empty(n // 16, chunks, size, dtype=torch.uint8, device="cuda").random_(0, 256)
    groups = {32: 4, 64: 2}.get(group_size, 1)
    scales = (torch.rand(n // 16, chunks, 16 * groups, device="cuda") + 0.5) / (4.6 * k**0.5)
    data[..., 1024 : 1024 + 32 * groups] = scales.half().view(torch.uint8)
    if asym:
        zeros = torch.randint(0, 17, (n // 16, chunks, 16 * groups), dtype=torch.uint8, device="cuda")
        data[..., 1024 + 32 * groups :] = zeros
    perm = torch.randperm(k, device="cuda").to(torch.int32) if act_order else None
    return PackedLinear(data, k, n, group_size, asym, perm, paired)


def torch_int4(k: int, n: int, m: int, group_size: int, copies: int) -> Callable[[], None]:
    """torch's own int4 product (bf16; scales and zero points by groups), on as many weights."""
    shape = torch._convert_weight_to_int4pack(torch.zeros(n, k // 2, dtype=torch.uint8, device="cuda"), 8).shape
    packed = torch.empty(copies, *shape, dtype=torch.int32, device="cuda")
    packed.view(torch.uint8).random_(0, 256)
    scales = torch.randn(copies, k // group_size, n, 2, device="cuda").mul_(0.01).bfloat16()
    x = torch.randn(m, k, device="cuda").bfloat16()

    def calls() -> None:
        for i in range(copies):
            torch._weight_int4pack_mm(x, packed[i], group_size, scales[i])

    return calls


def line(label: str, m: int, record: dict[str, Any]) -> str:
    us, cublas_us = record["us"], record["cublas_us"]
    return (
        f"{label:14s} M={m:5d} {us:8.2f} us  {record['tb_s']:5.2f} TB/s {record['tflops']:6.1f} TFLOP/s  "
        f"{record['fraction_of_floor']:5.0%} of the floor  cuBLAS {cublas_us:8.2f} us  x{cublas_us / us:.2f}"
    )


class Bench:
    def __init__(self, dtype: torch.dtype, group_size: int) -> None:
        self.dtype, self.group_size = dtype, group_size
        self.clock = Clock()
        gemm.prepare_same_bits(torch.device("cuda"))
        self.copy_tb_s, self.peak_tflops = ceilings()
        self.records: list[dict[str, Any]] = []
        self.sm_mhz = 0.0
        self.dense = torch.randn(ROTATE_BYTES // 2, device="cuda").mul_(0.02).half()

    def calls(self, copies: int, flops: float) -> int:
        """How many calls a graph holds: every copy once, and at most about 15 ms of work."""
        return max(2, min(copies, int(15_000 * self.peak_tflops * 1e6 / max(flops, 1.0))))

    def linear(self, label: str, k: int, n: int, ms: tuple[int, ...], variants: bool) -> None:
        """`variants`: asymmetric and act-order (activations gathered first) as well."""
        weights = self.pool(k, n, asym=False)
        asym = self.pool(k, n, asym=True) if variants else []
        perm = torch.randperm(k, device="cuda").to(torch.int32)
        order = [replace(w, perm=perm) for w in weights] if variants else []
        dense_count = max(1, self.dense.numel() // (k * n))
        dense = [self.dense[i * k * n : (i + 1) * k * n].view(n, k).t() for i in range(dense_count)]
        for m in ms:
            x = torch.randn(m, k, device="cuda").to(self.dtype)
            x16, out = x.half(), torch.empty(m, n, device="cuda", dtype=self.dtype)
            out16, flops = torch.empty(m, n, device="cuda", dtype=torch.float16), 2.0 * m * n * k
            copies = min(len(weights), len(asym)) if variants else len(weights)
            count, dense_calls = self.calls(copies, flops), self.calls(max(dense_count, 4), flops)

            def ours(pool: list[PackedLinear], x: Tensor = x, out: Tensor = out, count: int = count) -> None:
                for i in range(count):
                    gemm.gemm(x, pool[i], out, in_a_row=pool[i].perm is None)  # a gather stands between them

            def cublas(x: Tensor = x16, out: Tensor = out16, count: int = dense_calls) -> None:
                for i in range(count):
                    torch.mm(x, dense[i % dense_count], out=out)

            jobs: list[tuple[Callable[[], None], int]] = [(partial(ours, weights), count), (cublas, dense_calls)]
            work = self.work(weights[0].data.numel(), flops)
            more: list[tuple[tuple[int, float, float], dict[str, Any]]] = []
            if variants and m in VARIANT_M:
                jobs += [(partial(ours, asym), count), (partial(ours, order), count)]
                more += [(self.work(asym[0].data.numel(), flops), {"sym": False}), (work, {"act_order": True})]
            if m in TORCH_INT4_M and self.group_size in (32, 64, 128):
                jobs.append((torch_int4(k, n, m, self.group_size, len(weights)), len(weights)))
                more.append((work, {"kernel": "torch int4", "dtype": "bfloat16", "sym": False}))
            us, cublas_us, *others = self.timed(m, jobs)
            print(line(label, m, self.record(k, n, m, us, cublas_us, work)), end="")
            for other, (its_work, what) in zip(others, more, strict=True):
                self.record(k, n, m, other, cublas_us, its_work, **what)
                print(f"  {' '.join(f'{name} {value}' for name, value in what.items())}: {other:.2f}", end="")
            print(flush=True)

    def pool(self, k: int, n: int, *, asym: bool) -> list[PackedLinear]:
        """As many weights as do not fit into the L2 between two uses of one."""
        first = random_weight(k, n, self.group_size, asym=asym)
        copies = max(2, -(-ROTATE_BYTES // first.data.numel()))
        pool = first.data.unsqueeze(0).repeat(copies, 1, 1, 1)
        pool[..., :1024].random_(0, 256)
        return [replace(first, data=data) for data in pool]

    def timed(self, m: int, jobs: list[tuple[Callable[[], None], int]]) -> list[float]:
        if m <= COOL_M:
            self.clock.settle()
        times = in_turns(jobs)
        self.sm_mhz = self.clock.read()
        return times

    def chain(self, model: str, ms: tuple[int, ...]) -> None:
        """qkv, o, gate_up with SiLU(gate) * up, down: each reads what the one before wrote; no weight is used twice.
        With act-order as a model has it: norms and gate_up leave their results in the next one's order, o gathers."""
        shapes = LINEARS[model]
        layers = [
            [random_weight(k, n, self.group_size, paired=name == "gate_up") for name, (k, n) in shapes.items()]
            for _ in range(CHAIN_LAYERS)
        ]
        hidden, inner = shapes["qkv"][0], shapes["down"][0]
        perm = torch.randperm(hidden, device="cuda").to(torch.int32)
        ordered = [[qkv, replace(o, perm=perm), gate_up, down] for qkv, o, gate_up, down in layers]
        weight_bytes = sum(w.data.numel() for w in layers[0])
        fits = max(1, min(CHAIN_LAYERS, self.dense.numel() // sum(k * n for k, n in shapes.values())))
        for m in ms:
            x = torch.randn(m, hidden, device="cuda").to(self.dtype)
            x16 = x.half()

            def ours(
                layers: list[list[PackedLinear]], x: Tensor = x, in_a_row: bool = True, same_bits: bool = False
            ) -> None:
                product = partial(gemm.gemm, in_a_row=in_a_row, same_bits=same_bits)
                for qkv, o, gate_up, down in layers:
                    y = product(product(x, qkv)[:, :hidden], o)
                    product(product(y, gate_up, silu_mul=True), down)

            def cublas(x: Tensor = x16) -> None:
                for layer in range(CHAIN_LAYERS):
                    y, at = x, (layer % fits) * sum(k * n for k, n in shapes.values())
                    for name, (k, n) in shapes.items():
                        y = torch.mm(y, self.dense[at : at + k * n].view(n, k).t())
                        y, at = y[:, :hidden] if name == "qkv" else y[:, :inner] if name == "gate_up" else y, at + k * n

            jobs: list[tuple[Callable[[], None], int]] = [
                (partial(ours, layers), CHAIN_LAYERS),
                (partial(ours, ordered, in_a_row=False), CHAIN_LAYERS),
            ]
            jobs += [(cublas, CHAIN_LAYERS), (partial(ours, layers, in_a_row=False), CHAIN_LAYERS)]
            if m > gemm.DECODE_MAX_M:
                jobs.append((partial(ours, layers, same_bits=True), CHAIN_LAYERS))
            us, order_us, cublas_us, apart_us, *same_bits_us = self.timed(m, jobs)
            work = self.work(weight_bytes, 2.0 * m * sum(k * n for k, n in shapes.values()))
            record = self.record(0, 0, m, us, cublas_us, work, chain=model)
            print(line(f"chain {model}", m, record) + f"  act-order {order_us:.2f}", flush=True)
            self.record(0, 0, m, order_us, cublas_us, work, chain=model, act_order=True)
            for its_us in same_bits_us:
                print(f"{'':14s} with same_bits {its_us:8.2f} us", flush=True)
                self.record(0, 0, m, its_us, cublas_us, work, chain=model, same_bits=True)
            if m == 1:  # more rows are launched the same way
                print(f"{'':14s} not told that they are in a row {apart_us:8.2f} us", flush=True)
                self.record(0, 0, m, apart_us, cublas_us, work, chain=model, in_a_row=False)

    def record(
        self, k: int, n: int, m: int, us: float, cublas_us: float, work: tuple[int, float, float], **what: Any
    ) -> dict[str, Any]:
        """`work`: bytes of packed weight, floating-point operations, microseconds both must take."""
        weight_bytes, flops, floor = work
        sizes = {"K": k, "N": n, "M": m, "group_size": self.group_size, "sym": True, "act_order": False}
        entry = {"kernel": "gptq_api", "dtype": str(self.dtype).removeprefix("torch."), **sizes, **what}
        entry |= {"us": round(us, 3), "tb_s": round(weight_bytes / us / 1e6, 3), "tflops": round(flops / us / 1e6, 2)}
        entry |= {"fraction_of_floor": round(floor / us, 4), "cublas_us": round(cublas_us, 3)}
        entry |= {"sm_mhz": round(self.sm_mhz)}
        self.records.append(entry)
        return entry

    def work(self, weight_bytes: int, flops: float) -> tuple[int, float, float]:
        return weight_bytes, flops, max(weight_bytes / self.copy_tb_s, flops / self.peak_tflops) / 1e6

    def save(self, folder: Path | None, commit: str | None, began: float) -> None:
        """Called after every part, so that a run cut short leaves what it had."""
        if folder is None:
            return
        ceilings = {"copy_tb_s": round(self.copy_tb_s, 3), "cublas_tflops": round(self.peak_tflops, 1)}
        result = machine(commit) | ceilings | {"seconds": round(time.monotonic() - began, 1), "records": self.records}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"gemm-{result['gpu'].lower().replace(' ', '-')}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{path.name}: {len(self.records)} records after {result['seconds']} s", flush=True)


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {shape: f"{model} {name}" for model in ("13B", "7B") for name, shape in LINEARS[model].items()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    rows = [
        r
        for r in result["records"]
        if r["kernel"] == "gptq_api" and r["sym"] and not r["act_order"] and (r["K"], r["N"]) in names
    ]
    for index, shape in enumerate(dict.fromkeys((r["K"], r["N"]) for r in rows)):
        mine, colour = [r for r in rows if (r["K"], r["N"]) == shape], f"C{index}"
        ms = [r["M"] for r in mine]
        left.plot(ms, [r["tb_s"] for r in mine], "o-", color=colour, ms=3, label=names[shape])
        right.plot(ms, [r["tflops"] for r in mine], "o-", color=colour, ms=3, label=names[shape])
        right.plot(ms, [2e-6 * r["M"] * r["K"] * r["N"] / r["cublas_us"] for r in mine], ":", color=colour, lw=1)
    left.axhline(result["copy_tb_s"], color="k", lw=0.8, ls="--")
    left.set(xscale="log", xlabel="tokens M", ylabel="TB/s of packed weight", title="dashed: the copy ceiling")
    right.axhline(result["cublas_tflops"], color="k", lw=0.8, ls="--")
    right.set(
        xscale="log", yscale="log", xlabel="tokens M", ylabel="TFLOP/s", title="dotted: cuBLAS fp16, dashed: its best"
    )
    left.legend(fontsize=8)
    figure.suptitle(f"4-bit GEMM, {result['gpu']}, fp16, group 128, symmetric")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="13B alone, a few M")
    parser.add_argument("--chains", action="store_true", help="only the GEMMs of a layer in a row")
    parser.add_argument("--models", nargs="+", choices=list(LINEARS), default=None)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--commit", help="what was measured, where there is no git")
    parser.add_argument("--out", type=Path, help="folder for the .json and the .png")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only draw the picture of an earlier run")
    options = parser.parse_args()
    if options.draw is not None:
        draw(json.loads(options.draw.read_text()), options.draw.with_suffix(".png"))
        return
    if (reason := gemm.unavailable_reason()) is not None:
        sys.exit(f"no benchmark: {reason}")
    for name, what in OTHERS.items():
        state = (
            "importable, but this script has no adapter for it"
            if importlib.util.find_spec(name)
            else "not importable here"
        )
        print(f"{name} ({what}): {state}; skipped")
    began, bench = time.monotonic(), Bench(getattr(torch, options.dtype), options.group_size)
    print(f"copy {bench.copy_tb_s:.2f} TB/s, cuBLAS 8192^3 {bench.peak_tflops:.0f} TFLOP/s", flush=True)
    models = options.models or (["13B"] if options.quick else ["7B", "13B"] if options.chains else list(LINEARS))
    all_m = QUICK_M if options.quick else ALL_M
    for few in (True, False):
        done: set[tuple[int, int]] = set()
        for model in models:
            for name, (k, n) in LINEARS[model].items():
                if (k, n) not in done and not options.chains:
                    ms = tuple(m for m in all_m if (m <= COOL_M) == few)
                    bench.linear(f"{model} {name}", k, n, ms, variants=model == "13B")
                    done.add((k, n))
            if model in ("7B", "13B"):
                bench.chain(model, tuple(m for m in CHAIN_M if (m <= COOL_M) == few))
            bench.save(options.out, options.commit, began)
    if options.out is not None and importlib.util.find_spec("matplotlib"):
        for path in options.out.glob("gemm-*.json"):
            draw(json.loads(path.read_text()), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
