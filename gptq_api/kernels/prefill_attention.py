"""Causal attention of prompts over the paged KV cache: a Triton kernel, compiled at its first use."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gptq_api.kernels import launcher
from gptq_api.kernels.extension import compiled_for

__all__ = ["TILE_ROWS", "Tiling", "prefill_attention", "refusal", "tiling", "unavailable_reason"]

TILE_ROWS = 128
"""query rows of one tile"""
HEAD_DIMS = (64, 80, 96, 128, 256)


@dataclass(frozen=True)
class Tiling:
    """What one program of the kernel takes, and what it may use."""

    rows: int
    """of queries, TILE_ROWS or half of it"""
    keys: int
    """in a tile, which starts at a multiple of that"""
    warps: int
    max_registers: int | None
    """of a thread; None: as many as it likes"""

    @property
    def options(self) -> dict[str, Any]:
        """Triton's. Products and sums are contracted whatever Triton's default: bits would change with it."""
        return {
            "num_warps": self.warps,
            "num_stages": 2,
            "maxnreg": self.max_registers,
            "enable_fp_fusion": True,
        }


def tiling(code: int, head_dim: int, few: bool) -> Tiling:
    """`code`: the architecture that kernels are made for, 10 * major + minor. `few`: halves of tiles, because whole
    ones would leave SMs idle. A row has the same bits either way.

    Programs share an SM: one multiplies while the other takes its exponentials. With wgmma, and what came after it in
    data centers, one operand is in shared memory, and a cap on registers suffices for two. mma.sync, of all others,
    keeps both operands and the scores in registers: such a cap costs 300 bytes of stack a thread, half a tile none.
    """
    wide = head_dim > 128
    if 90 <= code < 120:
        rows = TILE_ROWS // 2 if few else TILE_ROWS
        return Tiling(rows, 64, rows // 16, None if few or wide else 128)
    # Three programs of heads of 64; without a number ptxas aims at four, and spills.
    return Tiling(TILE_ROWS // 2, 32, 8 if wide else 4, 168 if head_dim <= 64 else None)


def unavailable_reason() -> str | None:
    """Why the kernel cannot be compiled here, for people; None where it can. To be asked at start: the first prompt is
    too late."""
    if importlib.util.find_spec("triton") is None:
        return "prefill attention needs triton, which the CUDA builds of torch bring; this torch came without"
    if launcher.compiler() is None and launcher.precompiled() is None:
        return (
            "triton builds its launcher with a C compiler and Python's headers; install gcc and python3-dev, or set CC"
        )
    return None


def refusal(head_dim: int, block_size: int) -> str | None:
    """Why the kernel does not serve such a cache; None where it does."""
    if head_dim not in HEAD_DIMS:
        return f"head dimension {head_dim}; prefill attention holds {', '.join(map(str, HEAD_DIMS))}"
    if block_size < 8 or block_size & (block_size - 1):
        return f"KV cache blocks of {block_size} tokens; prefill attention needs a power of two, at least 8"
    return None


def prefill_attention(
    qkv: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    tiles: Tensor,
    out: Tensor,
    num_heads: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """out[row, h * D + d] = softmax(q . K^T * scale) V for the rows of `tiles`; other rows of `out` are left alone.

    qkv fp16 or bf16 [T, (num_heads + 2 * kv_heads) * D], contiguous, q rotated; kv_layer [blocks, 2, kv_heads,
    block_size, D] of that type or e4m3 (also viewed as uint8), the step's own keys and values written. int32 on the
    device: block_tables [S, max_blocks], context_lens [S] (tokens the last new row sees, itself included), query_start
    [S + 1] (first row of each sequence), tiles [max_tiles, 2] = (sequence, first row within it): TILE_ROWS rows from
    there or what the sequence has left; sequence -1: idle. A row sees all tokens up to its own, with `window` only the
    last so many. The grid depends on max_tiles alone, so the call may be captured into a CUDA graph, once it has been
    compiled by a call outside. Raises ValueError on what does not fit.
    """
    _, _, num_kv_heads, block_size, head_dim = kv_layer.shape
    _check(qkv, kv_layer, out, num_heads, window)
    for name, tensor, dims in (
        ("block_tables", block_tables, 2),
        ("context_lens", context_lens, 1),
        ("query_start", query_start, 1),
        ("tiles", tiles, 2),
    ):
        if tensor.dtype != torch.int32 or tensor.dim() != dims or tensor.stride(-1) != 1:
            raise ValueError(f"{name} {list(tensor.shape)} {tensor.dtype}, expected int32 of {dims} dimensions")
    if tiles.shape[0] == 0:
        return out
    launcher.use_precompiled()
    from gptq_api.kernels.prefill_attention_kernel import prefill_attention_kernel

    code, num_sms = _device(qkv.device)
    kv = kv_layer.view(cache_type(kv_layer.dtype, qkv.dtype, code))
    how = tiling(code, head_dim, few=num_heads * tiles.shape[0] < 2 * num_sms)
    prefill_attention_kernel[(num_heads, tiles.shape[0] * (TILE_ROWS // how.rows))](
        *(qkv, kv, block_tables, context_lens, query_start, tiles, out),
        *(block_tables.stride(0), 0 if window is None else window, scale * math.log2(math.e)),
        **constants(how, code, num_heads, num_kv_heads, head_dim, block_size, window is not None),
        **how.options,
        launch_pdl=_overlaps(code),
    )
    return out


def constants(
    how: Tiling, code: int, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, window: bool
) -> dict[str, Any]:
    """What the kernel is compiled for, beside the types of its arguments."""
    return {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": 1 << (head_dim - 1).bit_length(),
        "BLOCK_SIZE": block_size,
        "TILE_ROWS": TILE_ROWS,
        "ROWS": how.rows,
        "TILE_KEYS": how.keys,
        "WINDOW": window,
        "OVERLAP": _overlaps(code),
    }


def cache_type(stored: torch.dtype, activations: torch.dtype, code: int) -> torch.dtype:
    """As what the kernel reads a cache: e4m3 by the hardware where code of that architecture has a conversion."""
    if stored == activations:
        return stored
    return torch.float8_e4m3fn if code >= 89 else torch.uint8


def _overlaps(code: int) -> bool:
    """Whether kernels of that architecture take part in programmatic dependent launch."""
    return code >= 90


@cache
def _device(device: torch.device) -> tuple[int, int]:
    """(what its kernels were compiled for, its SMs)"""
    assert device.index is not None
    return compiled_for(device.index), torch.cuda.get_device_properties(device).multi_processor_count


def _check(qkv: Tensor, kv_layer: Tensor, out: Tensor, num_heads: int, window: int | None) -> None:
    _, kv, num_kv_heads, block_size, head_dim = kv_layer.shape
    if (reason := refusal(head_dim, block_size)) is not None:
        raise ValueError(reason)
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"qkv of {qkv.dtype}; prefill attention takes float16 and bfloat16")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} heads over {num_kv_heads} KV heads")
    width = (num_heads + 2 * num_kv_heads) * head_dim
    for name, tensor, columns in (("qkv", qkv, width), ("out", out, num_heads * head_dim)):
        if tensor.shape != (qkv.shape[0], columns) or tensor.dtype != qkv.dtype or not tensor.is_contiguous():
            expected = f"contiguous {[qkv.shape[0], columns]} {qkv.dtype}"
            raise ValueError(f"{name} {list(tensor.shape)} {tensor.dtype}, expected {expected}")
    if kv != 2 or kv_layer.dtype not in (qkv.dtype, torch.uint8, torch.float8_e4m3fn) or not kv_layer.is_contiguous():
        raise ValueError(f"kv_layer {list(kv_layer.shape)} {kv_layer.dtype}, expected contiguous {qkv.dtype} or e4m3")
    if window is not None and window < 1:
        raise ValueError(f"window {window}, expected at least 1")
