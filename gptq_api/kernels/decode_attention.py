"""Attention of one new token per sequence over its paged context, on CUDA: one kernel per layer in a pure decode step.

Which sequences are served is read on the device: those with exactly one new row and a context. In a pure decode step
the kernel also normalises and rotates q and k of the row and writes its key and value (`RotaryInputs`). Rows that are
consecutive tokens of one sequence count as sequences, and may share one reading of what they have in common
(`groups`). Work is cut into pieces by the row's own context alone, and pieces are added in a fixed order: a row's bits
depend neither on the batch nor on the run, nor on what it shares. Softmax in float32; the weights enter the product
with the values in the activations' type (fp16 with an e4m3 cache).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_api.kernels.extension import cuda as _cuda
from gptq_api.kernels.row_groups import MAX_NEW_ROWS

__all__ = ["BLOCK_SIZES", "HEAD_DIMS", "TEAMS", "RotaryInputs", "decode_attention", "decode_attention_workspace"]

HEAD_DIMS = (64, 128)
BLOCK_SIZES = (8, 16, 32, 64, 128, 256)
TEAMS = ("best", "blocks", "warps")
"""who attends to 128 tokens of a head: the four warps of a block, or one; a warp alone takes contexts of up to
MAX_CONTEXT_OF_WARPS tokens"""
MAX_CONTEXT_OF_WARPS = 4096


@dataclass(frozen=True)
class RotaryInputs:
    """What turns the rows of qkv as the product left them into queries, keys and values."""

    positions: Tensor
    """int32 [T]"""
    slot_mapping: Tensor
    """int32 [T]: block * block_size + offset, -1: the row is not cached"""
    cos_sin: Tensor
    """float32 [positions, D]: D/2 cosines, then D/2 sines"""
    q_norm: Tensor | None = None
    """[D] of the activations' type: RMSNorm of every head, before the rotation"""
    k_norm: Tensor | None = None
    eps: float = 0.0


def decode_attention_workspace(num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device | str) -> Tensor:
    """For calls of this shape with any number of sequences, one after another: some 40 MiB, 140 with 8 query heads per
    key head. Every call leaves it as it found it; calls that may overlap (other streams) need one each."""
    _check_head_dim(head_dim)
    device = torch.device(device)
    with torch.cuda.device(device):
        size = _cuda.attention_decode_workspace_bytes(num_heads, num_kv_heads, head_dim)
    return torch.full((size,), 255, dtype=torch.uint8, device=device)


def decode_attention(
    qkv: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    out: Tensor,
    num_heads: int,
    scale: float,
    workspace: Tensor,
    window: int | None = None,
    rotary: RotaryInputs | None = None,
    out_index: Tensor | None = None,
    *,
    groups: Tensor | None = None,
    prefetch: bool = False,
    teams: str = "best",
) -> Tensor:
    """Rows of `out` of the sequences with one new row; the others are left alone, except a row without a context (one
    that fills up a batch), which becomes zeros.

    qkv fp16 or bf16 [T, (num_heads + 2 * kv_heads) * D]; kv_layer [blocks, 2, kv_heads, block_size, D] of its type or
    e4m3 (also viewed as uint8); block_tables [S, max_blocks], context_lens [S] and query_start [S + 1] int32; out
    [T, num_heads * D]. `window`: a token sees so many tokens, itself included.

    `rotary`: qkv is as the product left it; the key and value of the row go into the cache and are attended to as the
    cache holds them. None: q is rotated and the cache complete.

    `out_index` int32 [num_heads * D]: where in its row each output goes; None: in order. For a few rows: elements are
    then stored one by one, and beyond some 16 rows a gather afterwards is cheaper. Not where warps attend alone.

    `groups` int32 [S, 2], as kernels/row_groups.py writes it; None: each row by itself. Entries of a group have one row
    each, one after another, contexts of consecutive lengths, and the same row of `block_tables`. With `rotary` there
    are at most MAX_NEW_ROWS entries, and the rows of a sequence attend to those before them as well. Not where warps
    attend alone.

    `prefetch` (with `rotary`): tables, lengths, positions and the keys and values of earlier tokens may be read while
    the kernel before this one still runs. True where all of that was complete before the first kernel of an unbroken
    chain of dependent launches began, as when a step is one graph.

    `teams`: of TEAMS; the bits of the result are the same.

    Raises ValueError on what does not fit, RuntimeError with the shape when a launch fails.
    """
    _, kv, num_kv_heads, block_size, head_dim = kv_layer.shape
    rows, sequences = qkv.shape[0], context_lens.shape[0]
    _check_head_dim(head_dim)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"blocks of {block_size} tokens; decode_attention takes {BLOCK_SIZES}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads on {num_kv_heads} key heads")
    _check_rows("qkv", qkv, (rows, (num_heads + 2 * num_kv_heads) * head_dim), qkv)
    _check_rows("out", out, (rows, num_heads * head_dim), qkv)
    fp8 = kv_layer.dtype in (torch.uint8, torch.float8_e4m3fn)
    placed = kv == 2 and kv_layer.is_contiguous() and kv_layer.device == qkv.device and kv_layer.data_ptr() % 16 == 0
    if not placed or not (fp8 or kv_layer.dtype == qkv.dtype):
        raise ValueError(
            f"kv_layer {_described(kv_layer)}, expected contiguous [blocks, 2, heads, block_size, {head_dim}] "
            f"of {qkv.dtype} or e4m3 on {qkv.device}"
        )
    if block_tables.dim() != 2 or block_tables.shape[0] < sequences or block_tables.stride(-1) != 1:
        raise ValueError(f"block_tables {_described(block_tables)}, expected int32 [{sequences}, blocks]")
    if block_tables.dtype != torch.int32 or block_tables.device != qkv.device:
        raise ValueError(f"block_tables {_described(block_tables)}, expected int32 on {qkv.device}")
    _check_indices("context_lens", context_lens, sequences, qkv)
    _check_indices("query_start", query_start, sequences + 1, qkv)
    if window is not None and window < 1:
        raise ValueError(f"window {window}, expected at least 1 or None")
    if teams not in TEAMS:
        raise ValueError(f"teams {teams!r}; one of {', '.join(TEAMS)}")
    if out_index is not None:
        _check_indices("out_index", out_index, num_heads * head_dim, qkv)
        if teams == "warps":
            raise ValueError("out_index with warps that attend alone, which know no order")
    if teams == "warps" and (longest := block_tables.stride(0) * block_size) > MAX_CONTEXT_OF_WARPS:
        raise ValueError(f"tables for {longest} tokens; a warp alone takes up to {MAX_CONTEXT_OF_WARPS}")
    if groups is not None:
        _check_indices("groups", groups, (sequences, 2), qkv)
        if teams == "warps":
            raise ValueError("groups with warps that attend alone, which have one row each")
        if rotary is not None and sequences > MAX_NEW_ROWS:
            raise ValueError(f"groups of {sequences} rows to rotate and write; decode_attention takes {MAX_NEW_ROWS}")
    if prefetch and rotary is None:
        raise ValueError("prefetch without rotary: the cache has just been written by another kernel")
    addresses = (0, 0, 0, 0, 0)
    if rotary is not None:
        _check_rotary(rotary, rows, head_dim, qkv)
        norms = (_address(rotary.q_norm), _address(rotary.k_norm))
        addresses = (
            *(rotary.positions.data_ptr(), rotary.slot_mapping.data_ptr(), rotary.cos_sin.data_ptr()),
            *norms,
        )
    if sequences == 0 or rows == 0:
        return out
    with torch.cuda.device(qkv.device):
        needed = _cuda.attention_decode_workspace_bytes(num_heads, num_kv_heads, head_dim)
        if workspace.numel() * workspace.element_size() < needed or workspace.device != qkv.device:
            raise ValueError(f"workspace {_described(workspace)}, expected {needed} bytes on {qkv.device}")
        _cuda.attention_decode(
            *(qkv.data_ptr(), kv_layer.data_ptr(), block_tables.data_ptr(), context_lens.data_ptr()),
            *(query_start.data_ptr(), out.data_ptr(), _address(out_index), _address(groups)),
            *(*addresses, workspace.data_ptr()),
            *(0.0 if rotary is None else rotary.eps, scale, qkv.stride(0), out.stride(0), block_tables.stride(0)),
            *(sequences, num_heads, num_kv_heads, block_size, head_dim, window or 0, prefetch),
            *(
                qkv.dtype == torch.bfloat16,
                fp8,
                0,
                TEAMS.index(teams),
                torch.cuda.current_stream(qkv.device).cuda_stream,
            ),
        )
    return out


def _check_head_dim(head_dim: int) -> None:
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head dimension {head_dim}; decode_attention takes {HEAD_DIMS}")


def _check_rotary(rotary: RotaryInputs, rows: int, head_dim: int, qkv: Tensor) -> None:
    _check_indices("positions", rotary.positions, rows, qkv)
    _check_indices("slot_mapping", rotary.slot_mapping, rows, qkv)
    table = rotary.cos_sin
    placed = table.is_contiguous() and table.device == qkv.device and table.data_ptr() % 16 == 0
    if table.dim() != 2 or table.shape[1] != head_dim or table.dtype != torch.float32 or not placed:
        raise ValueError(
            f"cos_sin {_described(table)}, expected contiguous float32 [positions, {head_dim}] on {qkv.device}"
        )
    for name, weight in (("q_norm", rotary.q_norm), ("k_norm", rotary.k_norm)):
        if weight is not None:
            _check_rows(name, weight, (head_dim,), qkv)


def _check_rows(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """fp16 or bf16 of that shape, of the type and device of `like`, in rows of whole 16-byte accesses."""
    aligned = tensor.data_ptr() % 16 == 0 and (tensor.dim() < 2 or tensor.stride(0) % 8 == 0) and tensor.stride(-1) == 1
    known = like.dtype in (torch.float16, torch.bfloat16) and tensor.dtype == like.dtype
    if tuple(tensor.shape) != shape or not known or not tensor.is_cuda or tensor.device != like.device or not aligned:
        raise ValueError(
            f"{name} {_described(tensor)}, expected {list(shape)} float16 or bfloat16 as qkv, rows 16-byte aligned"
        )


def _check_indices(name: str, tensor: Tensor, shape: int | tuple[int, ...], like: Tensor) -> None:
    expected = (shape,) if isinstance(shape, int) else shape
    if tuple(tensor.shape) != expected or tensor.dtype != torch.int32 or not tensor.is_contiguous():
        raise ValueError(f"{name} {_described(tensor)}, expected contiguous int32 {list(expected)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} on {tensor.device}, expected {like.device}")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
