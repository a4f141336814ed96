"""Every kind of launch of the CUDA kernels, small: what sanitize.py shows to compute-sanitizer.

Inputs come from the host, so that initcheck, which follows the writes of no kernel but ours, takes them for written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptq_api.kernels import gemm, ops, probes, sampling
from gptq_api.kernels.decode_attention import (
    MAX_CONTEXT_OF_WARPS,
    RotaryInputs,
    decode_attention,
    decode_attention_workspace,
)
from gptq_api.kernels.head import head
from gptq_api.kernels.layout import PackedLinear, sort_groups
from gptq_api.kernels.pack import columns_of, pack_on_device
from gptq_api.kernels.planes import pack_bytes, pack_head
from gptq_api.kernels.row_groups import RowGroups
from gptq_api.runner.cuda import graphs
from gptq_api.runner.cuda.runner import CudaRunner
from gptq_api.runner.load import load_runner
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.solo import Solo, step_of
from gptq_api.types import SamplingParams

DEVICE = "cuda"
DTYPES = (torch.float16, torch.bfloat16)


def normal(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def filled(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """What a kernel writes into: never written by us, so that initcheck sees who reads it."""
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def ints(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32).contiguous().to(DEVICE)


class Quantized:
    """A random weight as a checkpoint holds it, on the host."""

    def __init__(self, k: int, n: int, group_size: int, asym: bool, act_order: bool) -> None:
        size = k if group_size == -1 else group_size
        groups = -(-k // size)
        self.k, self.n, self.group_size = k, n, group_size
        self.qweight = torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int64).to(torch.int32)
        self.scales = ((torch.rand(groups, n) + 0.5) / (4.6 * k**0.5)).half()
        self.zeros = torch.randint(0, 17, (groups, n), dtype=torch.uint8) if asym else None
        self.g_idx = (torch.arange(k) // size)[torch.randperm(k)].to(torch.int32) if act_order else None
        self.perm = None if self.g_idx is None else sort_groups(self.g_idx, group_size)

    def packed(self, paired: bool = True) -> PackedLinear:
        """By the host, on the device."""
        arguments = (self.qweight, self.scales, self.zeros, self.g_idx, self.group_size, "cpu")
        weight = gemm.pack(*arguments, paired=paired)
        perm = None if weight.perm is None else weight.perm.to(DEVICE)
        return replace(weight, data=weight.data.to(DEVICE), perm=perm)

    def __str__(self) -> str:
        kind = "sym" if self.zeros is None else "asym"
        return f"K={self.k} N={self.n} group {self.group_size} {kind}{'' if self.perm is None else ' act-order'}"


def products() -> Iterator[str]:
    """The GEMV and the GEMMs that `gemm` chooses for this build, every format, and what it does before them; and what
    it chooses where a row's bits are not to depend on the others."""
    for k, n, group_size, asym, ms in (
        (1160, 528, 128, False, (1, 8, 9, 16, 20, 40, 100, 300)),
        (512, 272, 32, True, (3, 12, 33)),
        (512, 256, 64, False, (2, 17)),
        (2048, 256, -1, True, (3, 33)),
        (11008, 272, 128, False, (1, 8, 24)),  # two segments of k: in one block, in a cluster
        (256, 2112, 128, False, (4, 64)),  # blocks that bring x in together
    ):
        source = Quantized(k, n, group_size, asym, act_order=k == 1160)
        weight = source.packed()
        for dtype, m in product(DTYPES, ms):
            x, bias, residual = normal(m, k, dtype=dtype), normal(n, dtype=dtype), normal(m, n, dtype=dtype)
            gemm.gemm(x, weight, residual, bias=bias, residual=residual)
            gemm.gemm(x, weight, filled(m, n, dtype=dtype), in_a_row=m < 9 and weight.perm is None)
            gemm.gemm(x, weight, filled(m, n // 2, dtype=dtype), silu_mul=True)
            if m > gemm.DECODE_MAX_M:
                gemm.gemm(x, weight, residual, bias=bias, residual=residual, same_bits=True)
                gemm.gemm(x, weight, filled(m, n // 2, dtype=dtype), silu_mul=True, same_bits=True)
            yield f"gemm M={m} {source} {dtype}"


def planes() -> Iterator[str]:
    """Weights of 8 bits by the same kernels: sums of two rows, SiLU of them times up, float32."""
    for k, n, group_size, act_order, ms in (
        (1160, 264, 128, True, (1, 8, 9, 16, 20, 40, 100, 300)),
        (512, 136, 32, False, (3, 12, 33)),
        (11008, 136, 128, False, (1, 8, 24)),
    ):
        size = k if group_size == -1 else group_size
        groups = -(-k // size)
        qweight = torch.randint(-(2**31), 2**31, (k // 4, n), dtype=torch.int64).to(torch.int32)
        scales = ((torch.rand(groups, n) + 0.5) / (74 * k**0.5)).half()
        zeros = torch.randint(0, 256, (groups, n), dtype=torch.uint8)
        g_idx = (torch.arange(k) // size)[torch.randperm(k)].to(torch.int32) if act_order else None
        weight = pack_bytes(qweight, scales, zeros, g_idx, group_size, "cpu")
        perm = None if weight.perm is None else weight.perm.to(DEVICE)
        weight = replace(weight, data=weight.data.to(DEVICE), perm=perm)
        for dtype, m in product(DTYPES, ms):
            x, bias, residual = normal(m, k, dtype=dtype), normal(n, dtype=dtype), normal(m, n, dtype=dtype)
            for same_bits in (False, True) if m > gemm.DECODE_MAX_M else (False,):
                gemm.gemm(x, weight, residual, bias=bias, residual=residual, same_bits=same_bits)
                gemm.gemm(x, weight, filled(m, n, dtype=dtype), same_bits=same_bits)
                gemm.gemm(x, weight, residual, bias=bias, silu_times=residual, same_bits=same_bits)
            gemm.gemm(x, weight, filled(m, n, dtype=torch.float32), same_bits=True)
            yield f"gemm of 8 bits M={m} K={k} N={n} group {group_size} {dtype}"
        for dtype in DTYPES:
            probes.dequantize(weight, dtype)
        yield f"dequantize 8 bits K={k} N={n} group {group_size}"
    weight = pack_head(torch.randn(301, 200), "cpu")
    weight = replace(weight, data=weight.data.to(DEVICE))
    for m in (1, 9, 40):
        gemm.gemm(normal(m, 200), weight, filled(m, 304, dtype=torch.float32), same_bits=True)
        yield f"head of 8 bits M={m}"


def layouts() -> Iterator[str]:
    """Packing, unpacking and sorting."""
    for k, n, group_size, asym, act_order, paired in (
        (1160, 528, 128, False, True, True),
        (512, 272, 32, True, True, False),
        (512, 272, 64, False, False, True),
        (2056, 256, -1, True, False, False),
    ):
        source = Quantized(k, n, group_size, asym, act_order)
        perm = None if source.perm is None else source.perm.to(DEVICE)
        zeros = None if source.zeros is None else source.zeros.to(DEVICE)
        order = None if paired else torch.randperm(n)
        columns = columns_of(n, paired, order)
        data = pack_on_device(source.qweight.to(DEVICE), source.scales.to(DEVICE), zeros, perm, group_size, columns)
        weight = PackedLinear(data, k, n, group_size, zeros is not None, perm, paired)
        yield f"pack {source}{' paired' if paired else ' in another order'}"
        for dtype in DTYPES:
            probes.dequantize(weight, dtype)
            yield f"dequantize {source} {dtype}"
        if perm is not None:
            for m in (1, 9, 130):
                gemm.sort_activations(normal(m, k), weight)
                yield f"gather M={m} K={k}"


class Batch:
    """Sequences of these lengths and their cache, each with one new row, or with several that share a reading."""

    def __init__(
        self,
        lengths: list[int],
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        fp8: bool,
        block_size: int,
        rows: int = 1,
    ) -> None:
        self.heads, self.dtype, self.dim = heads, dtype, dim
        counts = [-(-n // block_size) for n in lengths]
        order = torch.randperm(sum(counts)).tolist()
        tables = torch.full((len(lengths), max(counts) + 2), -1, dtype=torch.int32)
        for table, count in zip(tables, counts, strict=True):
            table[:count] = torch.tensor([order.pop() for _ in range(count)])
        tables = tables.repeat_interleave(rows, 0)
        lens = (torch.tensor(lengths)[:, None] - torch.arange(rows - 1, -1, -1)).flatten()
        last = lens - 1
        slots = tables[torch.arange(len(lens)), last // block_size] * block_size + last % block_size
        self.tables, self.lens, self.positions, self.slots = ints(tables), ints(lens), ints(last), ints(slots)
        self.starts = ints(torch.arange(len(lens) + 1))
        shared = RowGroups.for_heads(heads, kv_heads, [None]).of(lens.tolist(), [*range(rows)] * len(lengths))
        self.groups = ints(shared) if rows > 1 else None
        cache = torch.randn(sum(counts), 2, kv_heads, block_size, dim)
        self.cache = cache.to(torch.float8_e4m3fn if fp8 else dtype).to(DEVICE)
        self.qkv = normal(len(lens), (heads + 2 * kv_heads) * dim, dtype=dtype)
        self.workspace = decode_attention_workspace(heads, kv_heads, dim, DEVICE)

    def rotary(self, longest: int, norms: bool) -> RotaryInputs:
        table = torch.rand(longest, self.dim).to(DEVICE)
        q_norm, k_norm = (normal(self.dim, dtype=self.dtype) if norms else None for _ in range(2))
        return RotaryInputs(self.positions, self.slots, table, q_norm, k_norm, 1e-5)

    def attend(
        self, teams: str, rotary: RotaryInputs | None, window: int | None = None, out_index: Tensor | None = None
    ) -> None:
        out = filled(len(self.qkv), self.heads * self.dim, dtype=self.dtype)
        decode_attention(
            *(self.qkv, self.cache, self.tables, self.lens, self.starts, out, self.heads, self.dim**-0.5),
            *(self.workspace, window, rotary, out_index),
            groups=self.groups,
            prefetch=rotary is not None,
            teams=teams,
        )


def attention() -> Iterator[str]:
    """Decode attention: whole blocks and lone warps, every cache, with the rotation and without, contexts that several
    blocks share, windows, parts of a group, rows of others, rows of a sequence."""
    short, long = [1, 129, 700, 33], [4200, 5]
    for lengths, heads, kv_heads, block_size, window, dims in (
        (short, 8, 2, 16, None, (64, 128)),
        (long, 11, 1, 16, None, (128,)),  # two parts of a group; chunks of two steps
        (short, 3, 3, 8, 100, (64,)),
        ([500] * 40, 4, 4, 64, None, (64,)),  # several steps a block
    ):
        for dtype, fp8, dim in product(DTYPES, (False, True), dims):
            batch = Batch(lengths, heads, kv_heads, dim, dtype, fp8, block_size)
            order = ints(torch.randperm(heads * dim))
            for team in ("blocks", "warps"):
                if team == "warps" and max(lengths) > MAX_CONTEXT_OF_WARPS:
                    continue
                batch.attend(team, None, window)
                batch.attend(team, batch.rotary(4200, norms=False), window)
                batch.attend(team, batch.rotary(4200, norms=True), window, order if team == "blocks" else None)
                cache = "e4m3" if fp8 else "16-bit"
                yield f"attention {team} {lengths[:4]} heads {heads}/{kv_heads} of {dim} {cache} {dtype}"
    mixed = Batch([40, 50, 300, 7, 20], 8, 2, 128, torch.float16, False, 16)
    mixed.starts, mixed.qkv = ints([0, 1, 11, 12, 15, 16]), normal(16, 12 * 128)
    mixed.lens = ints([40, 50, 300, 7, 0])
    mixed.attend("best", None)
    yield "attention of a mixed step, with a row of padding"
    for lengths, rows, heads, kv_heads, block_size in (
        ([131], 8, 4, 4, 16),
        ([4100], 5, 8, 4, 32),
        ([40, 260], 4, 7, 1, 8),
    ):
        for dtype, fp8, dim in product(DTYPES, (False, True), (64, 128)):
            several = Batch(lengths, heads, kv_heads, dim, dtype, fp8, block_size, rows)
            several.attend("best", several.rotary(4200, norms=False))
            several.attend("best", several.rotary(4200, norms=True), None, ints(torch.randperm(heads * dim)))
            several.attend("best", None)
            sick = torch.randn(rows * len(lengths), (heads + 2 * kv_heads) * dim)
            sick[1::3] = torch.nan
            several.qkv = sick.to(dtype).to(DEVICE)
            several.attend("best", several.rotary(4200, norms=False))
            yield f"attention of {rows} rows of {lengths} heads {heads}/{kv_heads} of {dim} e4m3 {fp8} {dtype}"


def between() -> Iterator[str]:
    """Embedding, RMSNorm, rotation and the write into the cache."""
    for dtype, rows in product(DTYPES, (1, 9, 130)):
        history, table = ints(torch.randint(0, 300, (9, 64))), normal(300, 72, dtype=dtype)
        positions = torch.randint(0, 64, (rows,))
        positions[rows // 2] = -1
        ops.embed(history, ints(torch.randint(0, 9, (rows,))), ints(positions), table, filled(rows, 72, dtype=dtype))
        yield f"embed T={rows} {dtype}"
        for width, perm in ((72, False), (5120, True), (16384, True)):
            x, weight = normal(rows, width, dtype=dtype), normal(width, dtype=dtype)
            order = ints(torch.randperm(width)) if perm else None
            ops.rms_norm(x, weight, 1e-5, filled(rows, width, dtype=dtype), order)
            yield f"rms_norm T={rows} H={width}{' in an order' if perm else ''} {dtype}"
        for dim, fp8, norms in ((64, False, True), (80, False, False), (128, True, True)):
            cache = torch.zeros(12, 2, 2, 16, dim).to(torch.float8_e4m3fn if fp8 else dtype).to(DEVICE)
            slots = torch.randperm(12 * 16)[:rows]
            slots[rows // 3] = -1
            q_norm, k_norm = (normal(dim, dtype=dtype) if norms else None for _ in range(2))
            qkv, cos_sin = normal(rows, (6 + 4) * dim, dtype=dtype), torch.rand(64, dim).to(DEVICE)
            ops.rope_and_write(qkv, ints(positions), ints(slots), cos_sin, cache, 6, q_norm, k_norm, 1e-5)
            yield f"rope_and_write T={rows} D={dim} {'e4m3' if fp8 else '16-bit'} {dtype}"


def heads() -> Iterator[str]:
    """The head by every tile that this build chooses: vocabularies and widths that end within a tile and a slot."""
    for size, width, ms in (
        (300, 200, (1, 9, 20, 40, 100, 150, 200, 300)),
        (1031, 1024, (1, 8, 33, 129)),
        (40000, 64, (3, 12, 70)),  # several tiles a block
    ):
        for dtype, m in product(DTYPES, ms):
            x, weight = normal(m, width, dtype=dtype), normal(size, width, dtype=dtype)
            torch.cuda.synchronize()
            head(x, weight, filled(m, size, dtype=torch.float32))
            head(x, weight, filled(m, size + 1, dtype=torch.float32)[:, :size])
            yield f"head M={m} V={size} H={width} {dtype}"


KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_k": 40, "top_p": 0.8},
    {"top_p": 0.9999999, "temperature": 2.0},
    {"min_p": 0.02, "top_k": 5000, "top_p": 0.95},
    {"repetition_penalty": 1.3, "frequency_penalty": -0.4},
    {"logit_bias": {3: 5.0, 0: -100.0}, "top_logprobs": 5},
    {"min_tokens": 90, "stop_token_ids": (1, 2, 5), "top_logprobs": 0},
)


def sampler() -> Iterator[str]:
    """Sampling by clusters of every size and by lone blocks, adjustments in place and beside, grammars, logprobs."""
    for rows, size in ((2, 128256), (13, 4097), (24, 700), (40, 4097), (70, 31)):
        logits = torch.randn(rows, size) * 3
        logits[1, size // 2] = torch.nan
        device_logits = logits.to(DEVICE)
        table = sampling.SamplingTable(rows)
        for seat in range(rows):
            params = SamplingParams(max_tokens=100, **{"seed": seat, **KINDS[seat % len(KINDS)]})
            table.set(seat, params, num_prompt_tokens=10)
        seats, lengths = [*range(rows - 1), -1], [20 + i % 40 for i in range(rows)]
        history = ints(torch.randint(0, min(size, 50), (rows, 80)))
        staging = torch.empty(sampling.FIELDS, rows, dtype=torch.int32)
        table.fill(staging.numpy(), seats, lengths)
        inputs = sampling.SamplingInputs(staging.to(DEVICE))
        entries = table.entries(seats, lengths).to(DEVICE)
        masked = list(range(0, rows, 3))
        words = np.random.default_rng(0).integers(-(2**31), 2**31, (len(masked), sampling.mask_words(size)))
        masks = sampling.packed_masks(rows, masked, words.astype(np.int32)).to(DEVICE)
        tokens = filled(rows, dtype=torch.int32)
        sampling.sample(device_logits, inputs, history, tokens)
        beside = filled(rows, size, dtype=torch.float32)
        sampling.adjust(device_logits, inputs, history, entries, beside, masks)
        sampling.sample(beside, inputs, history, tokens)
        logprobs = filled(rows, 2, 1 + sampling.MAX_TOP_LOGPROBS, dtype=torch.int32)
        sampling.logprobs(device_logits, inputs, tokens, logprobs)
        sampling.adjust(device_logits, inputs, history, entries)
        yield f"sampler S={rows} V={size}"


def steps(runner: CudaRunner) -> Iterator[str]:
    """A step of two prompts, then decode steps of both."""
    params = [
        SamplingParams(max_tokens=8, temperature=0.8, top_p=0.9, seed=1),
        SamplingParams(max_tokens=8, temperature=0.0, repetition_penalty=1.2, top_logprobs=3),
    ]
    prompts = [[5 + i for i in range(40)], [7, 8, 9]]
    solos = [Solo(prompts[i], params[i], block_table=list(range(8 * i, 8 * i + 8)), seat=i) for i in range(2)]
    for _ in range(4):
        rows = [solo.num_pending_tokens for solo in solos]
        for solo, token in zip(solos, runner.collect(runner.launch(step_of(solos, rows))).tokens, strict=True):
            assert 0 <= token < runner.vocab_size, f"token {token}"
            solo.token_ids.append(token)
        yield f"a step of {sum(rows)} rows"


def demo_runner() -> CudaRunner:
    loaded = load_runner(LoadOptions(device=DEVICE, num_blocks=64, max_num_seqs=4, max_num_batched_tokens=256))
    assert isinstance(loaded, CudaRunner), f"the demo model is served by {type(loaded).__name__}"
    return loaded


def demo() -> Iterator[str]:
    """Steps of the demo model through the runner, kernel by kernel: so every tensor may be an allocation of its own."""

    usual = graphs.Graphs.run
    graphs.Graphs.run = lambda self, shape, capture=True: usual(self, shape, capture=False)  # type: ignore[method-assign]
    try:
        yield from (f"demo: {what}" for what in steps(demo_runner()))
    finally:
        graphs.Graphs.run = usual  # type: ignore[method-assign]


def in_graphs() -> Iterator[str]:
    """The same as the server runs them: decode steps are graphs, and memory is torch's."""
    yield from (f"demo in graphs: {what}" for what in steps(demo_runner()))


PARTS: dict[str, Callable[[], Iterator[str]]] = {
    "products": products,
    "head": heads,
    "planes": planes,
    "layouts": layouts,
    "attention": attention,
    "between": between,
    "sampler": sampler,
    "demo": demo,
    "graphs": in_graphs,
}


def launch(part: str) -> list[str]:
    """Everything of a part once; what that was. Ends when the device is done."""
    torch.manual_seed(0)
    done = list(PARTS[part]())
    torch.cuda.synchronize()
    return done
