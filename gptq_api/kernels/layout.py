"""The packed weight of the CUDA kernels: 16-row strips, 128-k chunks (the picture is in ext/common/layout.cuh).

Plain torch, so the same lines run on the CPU and, at load time, on the GPU; `probes.emulate` reads the bytes back the
way a warp does. Knows nothing about checkpoints: values arrive unpacked, zero points decoded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

STRIP_ROWS = 16
CHUNK_K = 128
WEIGHT_BYTES = STRIP_ROWS * CHUNK_K // 2
SYMMETRIC_ZERO = 8


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight of 4 bits, or of 8 in two planes, as the kernels read it. Immutable; `data` is the only large tensor."""

    data: Tensor
    """uint8 [N/16, ceil(K/128), chunk_bytes], contiguous, 16-byte aligned."""
    in_features: int
    """K of the activations."""
    out_features: int
    """N, before SiLU pairing halves it. Rows of strips, but of planes, where an output has two."""
    group_size: int
    """32, 64, a multiple of 128, or -1 (one group)."""
    has_zeros: bool
    """False: every zero point is 8 and none is stored."""
    perm: Tensor | None
    """int32 [K]: the kernel's k-th input is x[perm[k]]. None: no act-order. The caller either hands over x[:, perm] and
    `without_perm`, or lets `gemm` gather."""
    paired: bool
    """Rows g and g+8 of a strip are outputs i and N/2 + i (gate_i, up_i)."""
    planes: bool = False
    """Of 8 bits (planes.py): rows g and g+8 of a strip are the upper and the lower nibbles of output 8 strip + g."""

    @property
    def num_rows(self) -> int:
        return self.data.shape[0] * STRIP_ROWS

    @property
    def groups_per_chunk(self) -> int:
        return groups_per_chunk(self.group_size)

    def without_perm(self) -> PackedLinear:
        """The same bytes for a caller whose activations already come in sorted order."""
        return replace(self, perm=None)


def groups_per_chunk(group_size: int) -> int:
    """Groups that one chunk of 128 k holds: 4, 2 or 1. Raises ValueError for sizes that do not tile a chunk."""
    if group_size in (32, 64):
        return CHUNK_K // group_size
    if group_size == -1 or (group_size > 0 and group_size % CHUNK_K == 0):
        return 1
    raise ValueError(f"group size {group_size}: the packed layout holds 32, 64, multiples of 128, and -1")


def chunk_bytes(group_size: int, has_zeros: bool) -> int:
    groups = groups_per_chunk(group_size)
    return WEIGHT_BYTES + 2 * STRIP_ROWS * groups + (STRIP_ROWS * groups if has_zeros else 0)


def sort_groups(g_idx: Tensor, group_size: int) -> Tensor | None:
    """Order of k that makes groups contiguous: int32 [K], or None where they already are.

    Raises ValueError when a group is not exactly `group_size` long (the last one may be short): such a g_idx does not
    come from GPTQ.
    """
    k = g_idx.numel()
    size = k if group_size == -1 else group_size
    regular = torch.arange(k, device=g_idx.device) // size
    perm = torch.argsort(g_idx.long(), stable=True)
    if not torch.equal(g_idx.long()[perm], regular):
        raise ValueError(f"g_idx does not hold groups of {size} rows over {k} inputs; this kernel cannot pack it")
    if torch.equal(perm, torch.arange(k, device=perm.device)):
        return None
    return perm.to(torch.int32)


def _chunk_rows(per_group: Tensor, chunks: int, group_size: int) -> Tensor:
    """[groups, N] -> [chunks, G, N]: what each chunk carries; beyond the last group, the last group again."""
    groups = groups_per_chunk(group_size)
    step = chunks * CHUNK_K if group_size == -1 else group_size
    start = torch.arange(chunks * groups, device=per_group.device) * (CHUNK_K // groups)
    return per_group[(start // step).clamp_(max=per_group.shape[0] - 1)].view(chunks, groups, -1)


def pair_order(n: int) -> Tensor:
    """Which of N outputs, gates then ups, each row of the strips of a paired weight is: int64 [N]."""
    return torch.arange(n).view(2, n // STRIP_ROWS, 8).transpose(0, 1).reshape(-1)


def pack_stream(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, *, paired: bool = False
) -> Tensor:
    """uint8 [N/16, ceil(K/128), chunk_bytes] from `weight` uint8 [K, N] (0..15, groups contiguous), `scales` fp16
    [groups, N] and `zeros` uint8 [groups, N] (0..16; None: all 8).

    Padding of k is filled with the zero point (15 for a zero point of 16, which no nibble can hold: kernels feed zeros
    there). Raises ValueError on shapes that do not fit.
    """
    k, n = weight.shape
    if n % STRIP_ROWS:
        raise ValueError(f"{n} output features: the packed layout needs a multiple of {STRIP_ROWS}")
    size = k if group_size == -1 else group_size
    expected = (-(-k // size), n)
    if tuple(scales.shape) != expected or (zeros is not None and tuple(zeros.shape) != expected):
        raise ValueError(f"scales {tuple(scales.shape)}: K={k}, N={n} in groups of {group_size} need {expected}")
    if paired:
        order = pair_order(n).to(weight.device)
        weight, scales = weight[:, order], scales[:, order]
        zeros = None if zeros is None else zeros[:, order]
    strips, chunks = n // STRIP_ROWS, -(-k // CHUNK_K)
    if chunks * CHUNK_K > k:
        fill = (
            torch.full((n,), SYMMETRIC_ZERO, dtype=torch.uint8, device=weight.device)
            if zeros is None
            else zeros[-1].clamp(max=15)
        )
        weight = torch.cat([weight, fill.expand(chunks * CHUNK_K - k, n)])
    # k = 128c + 64b + 16j + 8h + 2t + e, n = 16s + 8r + g: byte (j, e, h) of lane (g, t) holds r = 0 low and r = 1 high
    split = weight.view(chunks, 2, 4, 2, 4, 2, strips, 2, 8)
    nibbles = split[..., 0, :] | (split[..., 1, :] << 4)
    parts = [nibbles.permute(6, 0, 1, 7, 4, 2, 5, 3).reshape(strips, chunks, WEIGHT_BYTES)]
    by_chunk = _chunk_rows(scales.to(torch.float16), chunks, group_size).view(chunks, -1, strips, 2, 8)
    parts.append(by_chunk.permute(2, 0, 1, 4, 3).contiguous().view(torch.uint8).view(strips, chunks, -1))
    if zeros is not None:
        by_chunk = _chunk_rows(zeros, chunks, group_size).view(chunks, -1, strips, 2, 8)
        parts.append(by_chunk.permute(2, 0, 1, 4, 3).reshape(strips, chunks, -1))
    return torch.cat(parts, dim=-1)
