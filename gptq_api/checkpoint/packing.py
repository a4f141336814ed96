"""The bit layout of GPTQ tensors: `qweight` packed along K, `qzeros` along N, little-endian, in int32 words.

A packed axis is one contiguous little-endian bit stream: value i occupies bits [i*bits, (i+1)*bits). For 2, 4 and 8
bits no value straddles a word; for 3 bits 32 values fill 3 words and values 10 and 21 straddle. The packed axis must
hold a whole number of words (3 bits: a multiple of 32 values).

Zero points have two versions on disk. v2 stores the zero point. v1 (GPTQ-for-LLaMa, AutoGPTQ, GPTQModel's default)
stores zero - 1; its writers subtracted 0x11111111 (4 bits; 0x01010101, 0x55555555 for 8, 2) from whole words, with
borrow between fields, so v1 is read by adding the same constant to whole words modulo 2**32. 3-bit zeros are shifted
field by field.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ZeroVersion = Literal[1, 2]

SUPPORTED_BITS = (2, 3, 4, 8)
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def values_per_unit(bits: int) -> int:
    """The smallest number of values that fills whole words: 32 / bits, or 32 for 3 bits."""
    return 32 if bits == 3 else 32 // bits


def pack_qweight(q: Tensor, bits: int) -> Tensor:
    """uint8 [K, N], values below 2**bits -> int32 [K * bits / 32, N]. ValueError where K does not fill whole words."""
    return _pack_rows(q, bits)


def unpack_qweight(qweight: Tensor, bits: int) -> Tensor:
    """int32 [K * bits / 32, N] -> uint8 [K, N]."""
    return _unpack_rows(qweight, bits)


def pack_qzeros(z: Tensor, bits: int, version: ZeroVersion = 1) -> Tensor:
    """Zero points below 2**bits, uint8 [G, N] -> int32 [G, N * bits / 32]."""
    if bits == 3 and version == 1:
        return _pack_rows(((z.t().to(torch.int16) - 1) & 7).to(torch.uint8), 3).t().contiguous()
    words = _pack_rows(z.t(), bits).t().contiguous()
    return _add_words(words, -_ONES[bits]) if version == 1 else words


def unpack_qzeros(qzeros: Tensor, bits: int, version: ZeroVersion = 1) -> Tensor:
    """int32 [G, N * bits / 32] -> zero points, uint8 [G, N]."""
    if bits == 3:
        stored = _unpack_rows(qzeros.t(), 3).t().contiguous()
        return (stored + 1) & 7 if version == 1 else stored
    words = _add_words(qzeros, _ONES[bits]) if version == 1 else qzeros
    return _unpack_rows(words.t(), bits).t().contiguous()


def _add_words(words: Tensor, constant: int) -> Tensor:
    """Addition modulo 2**32 on int32 words (int64 in between: signed overflow is not defined everywhere)."""
    return _to_int32(words.to(torch.int64) + constant)


def _to_int32(words: Tensor) -> Tensor:
    low = words & 0xFFFFFFFF
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32)


def _pack_rows(values: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] -> int32 [R * bits / 32, C]."""
    _check_bits(bits)
    unit = values_per_unit(bits)
    if values.ndim != 2 or values.shape[0] % unit:
        raise ValueError(
            f"{bits}-bit packing needs a multiple of {unit} values along the packed axis, got {tuple(values.shape)}"
        )
    if values.numel() and int(values.max()) >= 1 << bits:
        raise ValueError(f"value {int(values.max())} does not fit in {bits} bits")
    fields = values.reshape(-1, unit, values.shape[1])
    num_words = unit * bits // 32
    words = torch.zeros(fields.shape[0], num_words, values.shape[1], dtype=torch.int64, device=values.device)
    for i in range(unit):
        word, shift = divmod(i * bits, 32)
        field = fields[:, i].to(torch.int64) << shift
        words[:, word] |= field & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= field >> 32
    return _to_int32(words).reshape(-1, values.shape[1])


def _unpack_rows(words: Tensor, bits: int) -> Tensor:
    """int32 [R * bits / 32, C] -> uint8 [R, C]."""
    _check_bits(bits)
    unit = values_per_unit(bits)
    num_words = unit * bits // 32
    if words.ndim != 2 or words.shape[0] % num_words:
        raise ValueError(
            f"{bits}-bit words come in multiples of {num_words} along the packed axis, got {tuple(words.shape)}"
        )
    groups = words.reshape(-1, num_words, words.shape[1])
    out = torch.empty(groups.shape[0], unit, words.shape[1], dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for i in range(unit):
        word, shift = divmod(i * bits, 32)
        # The shift of an int32 is arithmetic; the mask after it removes the copied sign.
        field = groups[:, word] >> shift
        if shift + bits > 32:
            low = 32 - shift
            field = (field & ((1 << low) - 1)) | (groups[:, word + 1] << low)
        out[:, i] = (field & mask).to(torch.uint8)
    return out.reshape(-1, words.shape[1])


def _check_bits(bits: int) -> None:
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"bits is one of {SUPPORTED_BITS}, not {bits}")
