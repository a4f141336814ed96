"""Embedding, RMSNorm and rotary embedding on a CUDA device against plain torch in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptq_api.kernels import gemm, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
ROWS = (1, 2, 7, 127, 128, 700, 2049)
"""on both sides of every change of kernel, and more rows than blocks"""


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, device="cuda", dtype=torch.int32)


def assert_rounded(found: Tensor, expected: Tensor, scale: float = 1.0, dtype: torch.dtype | None = None) -> None:
    """`expected` in float32: found may be off by one rounding to dtype (None: its own)."""
    dtype = found.dtype if dtype is None else dtype
    assert found.shape == expected.shape
    steps = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float8_e4m3fn: 2**-4}
    smallest = {torch.float16: 1e-6, torch.bfloat16: 1e-6, torch.float8_e4m3fn: 2**-10}[dtype]
    bound = (steps[dtype] * 1.01 + 1e-6) * expected.abs() + smallest * scale
    assert bool(((found.float() - expected).abs() <= bound).all())


@DTYPES
@pytest.mark.parametrize("width", [64, 2048, 5120, 8192])
def test_embedding_reads_the_token_at_each_rows_position(width: int, dtype: torch.dtype) -> None:
    vocabulary, length = 300, 64
    table = random(vocabulary, width, dtype=dtype)
    for rows in ROWS:
        history = integers(0, vocabulary, 9, length, seed=rows)[:, : length - 5]
        history[3] = -1
        history[4] = vocabulary
        row_slot, positions = integers(0, 9, rows), integers(0, length - 5, rows, seed=1)
        positions[rows // 2] = -1
        out = torch.full((rows, width), torch.nan, dtype=dtype, device="cuda")
        assert ops.embed(history, row_slot, positions, table, out) is out
        token = history[row_slot.long(), positions.clamp(min=0).long()].long()
        shown = (positions >= 0) & (token >= 0) & (token < vocabulary)
        assert torch.equal(out, table[token.clamp(0, vocabulary - 1)] * shown.unsqueeze(1)), rows


@DTYPES
@pytest.mark.parametrize("width", [8, 72, 768, 2048, 4096, 5120, 8192, 8200, 16384])
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    weight = random(width, dtype=dtype, seed=1)
    perm = torch.randperm(width, generator=torch.Generator("cuda").manual_seed(2), device="cuda").int()
    everything = random(max(ROWS), width + 8, dtype=dtype, seed=3) * 7
    whole = ops.rms_norm(everything[:, :width], weight, 1e-5, torch.empty_like(everything[:, :width]))
    for rows in ROWS:
        x = everything[:rows, :width]
        out = torch.full((rows, width), torch.nan, dtype=dtype, device="cuda")
        assert ops.rms_norm(x, weight, 1e-5, out) is out
        exact = x.float() * torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-5) * weight.float()
        assert_rounded(out, exact)
        assert torch.equal(out, whole[:rows])
        permuted = torch.full_like(out, torch.nan)
        ops.rms_norm(x, weight[perm.long()], 1e-5, permuted, perm)
        assert torch.equal(permuted, out[:, perm.long()])


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(40, 40), (32, 8), (5, 1)])
@pytest.mark.parametrize("fp8", [False, True], ids=["16-bit", "e4m3"])
def test_rope_and_write(fp8: bool, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    blocks, block_size, length = 160, 16, 500
    angles = torch.randn(length, head_dim // 2, device="cuda") * 10
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
    cache_type = torch.float8_e4m3fn if fp8 else dtype
    shape = (blocks, 2, kv_heads, block_size, head_dim)
    for rows in ROWS[:-1]:
        for norm in (False, True):
            qkv = random(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=rows)
            positions = integers(0, length, rows)
            slots = torch.randperm(blocks * block_size, device="cuda").int()[:rows].contiguous()
            positions[rows // 3] = -1
            slots[rows // 2] = -1
            cache = torch.full(shape, 3.0, device="cuda").to(cache_type)
            weights = [random(head_dim, dtype=dtype, seed=i) for i in range(2)] if norm else [None, None]
            before = qkv.clone()
            stored = cache.view(torch.uint8) if fp8 else cache
            ops.rope_and_write(qkv, positions, slots, cos_sin, stored, heads, weights[0], weights[1], 1e-6)

            q, k, v = before.float().view(rows, -1, head_dim).split([heads, kv_heads, kv_heads], 1)
            q, k = (
                exact_rotation(x, weight, cos_sin[positions.clamp(min=0).long()].unsqueeze(1))
                for x, weight in ((q, weights[0]), (k, weights[1]))
            )
            real = positions >= 0
            found = qkv.view(rows, -1, head_dim)
            assert torch.equal(qkv[~real], before[~real])
            assert_rounded(found[real, :heads], q[real], 8)
            assert_rounded(found[real, heads : heads + kv_heads], k[real], 8)
            assert torch.equal(found[:, heads + kv_heads :].float(), v)

            by_slot = cache.float().transpose(2, 3).transpose(1, 2).reshape(blocks * block_size, 2, kv_heads, head_dim)
            written = real & (slots >= 0)
            at = slots[written].long()
            assert_rounded(by_slot[at, 0], k[written], 8, cache_type)
            assert_rounded(by_slot[at, 1], v[written], 1, cache_type)
            untouched = torch.ones(blocks * block_size, dtype=torch.bool, device="cuda")
            untouched[at] = False
            assert bool((by_slot[untouched] == 3).all())


def exact_rotation(x: Tensor, weight: Tensor | None, cos_sin: Tensor) -> Tensor:
    if weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight.float()
    (low, high), (cos, sin) = x.chunk(2, -1), cos_sin.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def test_large_keys_saturate_in_e4m3() -> None:
    qkv = torch.full((1, 3 * 64), 1000.0, dtype=torch.float16, device="cuda")
    zero = torch.zeros(1, dtype=torch.int32, device="cuda")
    cos_sin = torch.cat([torch.ones(1, 32), torch.zeros(1, 32)], 1).cuda()
    cache = torch.zeros(1, 2, 1, 16, 64, device="cuda").to(torch.float8_e4m3fn)
    ops.rope_and_write(qkv, zero, zero, cos_sin, cache, 1)
    assert bool((cache[0, :, 0, 0].float() == 448).all())


def test_more_rows_than_a_grid_is_high() -> None:
    """Of a grid's dimensions only the first goes beyond 65,535."""
    rows, block_size = 70_001, 16
    table, weight = random(500, 64, dtype=torch.float16), random(64, dtype=torch.float16)
    positions, seats = integers(0, 100, rows), integers(0, 3, rows, seed=1)
    history = integers(0, 500, 3, 100)
    x = ops.embed(history, seats, positions, table, torch.empty(rows, 64, dtype=torch.float16, device="cuda"))
    assert torch.equal(x, table[history[seats.long(), positions.long()].long()])
    normed = ops.rms_norm(x, weight, 1e-5, torch.empty_like(x))
    assert torch.equal(normed[-1], ops.rms_norm(x[-1:], weight, 1e-5, torch.empty_like(x[-1:]))[0])
    angles = torch.rand(100, 32, device="cuda")
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
    cache = torch.zeros(-(-rows // block_size), 2, 1, block_size, 64, dtype=torch.float16, device="cuda")
    qkv = random(rows, 3 * 64, dtype=torch.float16)
    before = qkv.clone()
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    ops.rope_and_write(qkv, positions, slots, cos_sin, cache, 1)
    turns = cos_sin[positions.long()]
    assert_rounded(qkv[:, :64], exact_rotation(before[:, :64].float(), None, turns), 8)
    assert_rounded(qkv[:, 64:128], exact_rotation(before[:, 64:128].float(), None, turns), 8)
    by_slot = cache.transpose(1, 3).reshape(-1, 2, 64)[:rows]
    assert torch.equal(by_slot.reshape(rows, 128), qkv[:, 64:])


@DTYPES
def test_every_number_is_rounded_to_e4m3_as_torch_rounds(dtype: torch.dtype) -> None:
    """By the hardware, or by bit arithmetic in code for GPUs before 8.9; all 65,536 numbers of either type."""
    numbers = torch.arange(65536, dtype=torch.int32, device="cuda").to(torch.int16).view(dtype).view(1024, 64)
    qkv = torch.cat([torch.zeros(1024, 128, dtype=dtype, device="cuda"), numbers], 1)
    positions = torch.zeros(1024, dtype=torch.int32, device="cuda")
    cos_sin = torch.cat([torch.ones(1, 32), torch.zeros(1, 32)], 1).cuda()
    cache = torch.zeros(64, 2, 1, 16, 64, device="cuda").to(torch.float8_e4m3fn)
    ops.rope_and_write(qkv, positions, torch.arange(1024, dtype=torch.int32, device="cuda"), cos_sin, cache, 1)
    found = cache[:, 1].reshape(1024, 64).view(torch.uint8)
    expected = numbers.float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    is_nan = numbers.isnan()
    assert torch.equal(found[~is_nan], expected[~is_nan])
    assert bool((found[is_nan] & 127 == 127).all())


def test_a_captured_chain_replays_with_new_inputs() -> None:
    """The kernels overlap by programmatic dependent launch; each has to see what the one before it wrote."""
    width, heads, rows = 1024, 8, 40
    table, weight = random(100, width, dtype=torch.float16), random(width, dtype=torch.float16)
    history, row_slot = integers(0, 100, rows, 32), torch.arange(rows, dtype=torch.int32, device="cuda")
    positions = torch.zeros(rows, dtype=torch.int32, device="cuda")
    cos_sin = torch.cat([torch.ones(32, 64), torch.zeros(32, 64)], 1).cuda()
    cache = torch.zeros(rows, 2, heads, 16, 128, dtype=torch.float16, device="cuda")
    slots = row_slot * 16
    x, qkv = (torch.empty(rows, n, dtype=torch.float16, device="cuda") for n in (width, 3 * width))

    def chain() -> None:
        ops.embed(history, row_slot, positions, table, x)
        for i in range(3):
            ops.rms_norm(x, weight, 1e-5, qkv[:, i * width : (i + 1) * width])
            ops.rms_norm(qkv[:, i * width : (i + 1) * width], weight, 1e-5, x)
        ops.rope_and_write(qkv, positions, slots, cos_sin, cache, heads)

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for step in range(5):
        positions.fill_(step)
        graph.replay()
        found = cache.clone()
        chain()
        assert torch.equal(found, cache)
        assert not torch.equal(found[0], found[1])


def test_wrong_inputs_are_refused() -> None:
    x, weight = random(2, 64, dtype=torch.float16), random(64, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"weight \[64\] torch\.float32"):
        ops.rms_norm(x, weight.float(), 1e-5, torch.empty_like(x))
    with pytest.raises(ValueError, match="int32"):
        ops.rms_norm(x, weight, 1e-5, torch.empty_like(x), torch.arange(64, device="cuda"))
    with pytest.raises(ValueError, match="16-byte aligned"):
        ops.rms_norm(random(2, 60, dtype=torch.float16), weight[:60], 1e-5, x[:, :60])
    with pytest.raises(ValueError, match="at most 16384"):
        ops.rms_norm(random(1, 16392, dtype=torch.float16), weight, 1e-5, x)
    cache, index = torch.zeros(1, 2, 1, 16, 72, dtype=torch.float16, device="cuda"), integers(0, 1, 2)
    with pytest.raises(ValueError, match="head dimension 72"):
        ops.rope_and_write(random(2, 216, dtype=torch.float16), index, index, torch.ones(4, 72).cuda(), cache, 1)
