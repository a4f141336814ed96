"""What a layer does between its products, on CUDA: embedding, RMSNorm, rotary embedding with the write into the cache.

Each is one kernel on the current stream, takes part in programmatic dependent launch, and may be captured into a CUDA
graph: which rows are real is read from device tensors. Index tensors are contiguous int32 on the device. Arithmetic is
float32, rounded once. Shapes, types and devices are checked here and raise ValueError; the extension takes addresses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_api.kernels.extension import cuda as _cuda

__all__ = ["MAX_NORM_WIDTH", "embed", "rms_norm", "rope_and_write"]

MAX_NORM_WIDTH = 16384
"""of the widest LLaMA; two rows of it fit into shared memory"""


def embed(history: Tensor, row_seat: Tensor, positions: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """out[t] = table[history[row_seat[t], positions[t]]]; zeros where the position is -1 or the token not in the table.

    history int32 [max_num_seqs, max_model_len]; row_seat and positions int32 [T]; table fp16 or bf16 [V, H], out
    [T, H] of its type.
    """
    rows, width = out.shape
    _check_activations("table", table, (table.shape[0], width))
    _check_activations("out", out, (rows, width), like=table)
    _check_indices("row_seat", row_seat, rows, table)
    _check_indices("positions", positions, rows, table)
    if history.dim() != 2 or history.dtype != torch.int32 or history.stride(1) != 1 or history.device != table.device:
        raise ValueError(f"history {_described(history)}, expected int32 [sequences, tokens] on {table.device}")
    if not table.is_contiguous() or not out.is_contiguous():
        raise ValueError("table and out have to be contiguous")
    if rows:
        with torch.cuda.device(out.device):
            addresses = (history.data_ptr(), row_seat.data_ptr(), positions.data_ptr(), table.data_ptr())
            _cuda.embed(*addresses, out.data_ptr(), rows, table.shape[0], width, history.stride(0), _stream(out))
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, perm: Tensor | None = None) -> Tensor:
    """out[:, i] = (x / sqrt(mean(x^2) + eps))[:, perm[i]] * weight[i].

    x and out fp16 or bf16 [T, H], weight [H] of their type, perm int32 [H] or None. H is a multiple of 8, at most
    MAX_NORM_WIDTH. The bits of a row depend neither on T nor, places aside, on perm.
    """
    check_norm(x, weight, out, perm)
    rows, width = x.shape
    if rows:
        with torch.cuda.device(x.device):
            addresses = (x.data_ptr(), weight.data_ptr(), 0 if perm is None else perm.data_ptr(), out.data_ptr())
            strides = (x.stride(0), out.stride(0))
            _cuda.rms_norm(*addresses, rows, width, *strides, eps, x.dtype == torch.bfloat16, _stream(x))
    return out


def check_norm(x: Tensor, weight: Tensor, out: Tensor, perm: Tensor | None) -> None:
    """ValueError for what `rms_norm` does not take."""
    rows, width = x.shape
    if width > MAX_NORM_WIDTH:
        raise ValueError(f"{width} features; rms_norm takes at most {MAX_NORM_WIDTH}")
    _check_activations("x", x, (rows, width))
    _check_activations("out", out, (rows, width), like=x)
    _check_activations("weight", weight, (width,), like=x)
    if perm is not None:
        _check_indices("perm", perm, width, x)


def rope_and_write(
    qkv: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cos_sin: Tensor,
    kv_layer: Tensor,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Normalises (where weights [D] are given) and rotates q and k in place, and writes k and v into their slots.

    qkv fp16 or bf16 [T, (num_heads + 2 * kv_heads) * D]; positions int32 [T], -1: the row is left alone; slot_mapping
    int32 [T], block * block_size + offset, -1: not cached; cos_sin float32 [positions, D], D/2 cosines, then D/2 sines;
    kv_layer [blocks, 2, kv_heads, block_size, D] of qkv's type, or e4m3 (also viewed as uint8), rounded from float32
    and saturating. D is a multiple of 16, at most 128.
    """
    _, kv, num_kv_heads, block_size, head_dim = kv_layer.shape
    rows = qkv.shape[0]
    if head_dim % 16 or head_dim > 128:
        raise ValueError(f"head dimension {head_dim}; rope_and_write takes multiples of 16 up to 128")
    _check_activations("qkv", qkv, (rows, (num_heads + 2 * num_kv_heads) * head_dim))
    _check_indices("positions", positions, rows, qkv)
    _check_indices("slot_mapping", slot_mapping, rows, qkv)
    fp8 = kv_layer.dtype in (torch.uint8, torch.float8_e4m3fn)
    placed = kv == 2 and kv_layer.is_contiguous() and kv_layer.device == qkv.device
    if not placed or not (fp8 or kv_layer.dtype == qkv.dtype):
        raise ValueError(
            f"kv_layer {_described(kv_layer)}, expected contiguous [blocks, 2, heads, block_size, {head_dim}] "
            f"of {qkv.dtype} or e4m3 on {qkv.device}"
        )
    if cos_sin.dim() != 2 or cos_sin.shape[1] != head_dim or cos_sin.dtype != torch.float32:
        raise ValueError(f"cos_sin {_described(cos_sin)}, expected float32 [positions, {head_dim}]")
    if not cos_sin.is_contiguous() or cos_sin.device != qkv.device:
        raise ValueError(f"cos_sin has to be contiguous on {qkv.device}")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            _check_activations(name, weight, (head_dim,), like=qkv)
    if rows:
        with torch.cuda.device(qkv.device):
            addresses = (qkv.data_ptr(), positions.data_ptr(), slot_mapping.data_ptr(), cos_sin.data_ptr())
            norms = (0 if q_norm is None else q_norm.data_ptr(), 0 if k_norm is None else k_norm.data_ptr())
            sizes = (rows, num_heads, num_kv_heads, head_dim, block_size, qkv.stride(0))
            formats = (qkv.dtype == torch.bfloat16, fp8)
            _cuda.rope_and_write(*addresses, kv_layer.data_ptr(), *norms, *sizes, eps, *formats, _stream(qkv))


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"


def _check_activations(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor | None = None) -> None:
    """fp16 or bf16 of that shape (and of the type and device of `like`), in rows of whole 16-byte accesses."""
    dtypes = (torch.float16, torch.bfloat16) if like is None else (like.dtype,)
    rows_fit = tensor.dim() < 2 or tensor.stride(0) % 8 == 0
    placed = shape[-1] % 8 == 0 and tensor.stride(-1) == 1 and rows_fit and tensor.data_ptr() % 16 == 0
    known = tensor.is_cuda if like is None else tensor.device == like.device
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or not placed or not known:
        expected = "float16 or bfloat16 on a CUDA device" if like is None else f"{like.dtype} on {like.device}"
        raise ValueError(f"{name} {_described(tensor)}, expected {list(shape)} {expected}, rows 16-byte aligned")


def _check_indices(name: str, tensor: Tensor, length: int, like: Tensor) -> None:
    if tuple(tensor.shape) != (length,) or tensor.dtype != torch.int32 or not tensor.is_contiguous():
        raise ValueError(f"{name} {_described(tensor)}, expected contiguous int32 [{length}]")
    if tensor.device != like.device:
        raise ValueError(f"{name} on {tensor.device}, expected {like.device}")
