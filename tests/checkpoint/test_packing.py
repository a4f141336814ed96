"""Bit layout of qweight and qzeros, against a plain bit-stream written with Python integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_api.checkpoint.packing import (
    ZeroVersion,
    pack_qweight,
    pack_qzeros,
    unpack_qweight,
    unpack_qzeros,
    values_per_unit,
)

shapes = st.tuples(st.sampled_from([2, 3, 4, 8]), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**31))


def _random(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


def _bit_stream(values: list[int], bits: int) -> list[int]:
    """One long integer, cut into signed 32-bit words."""
    number = sum(value << (i * bits) for i, value in enumerate(values))
    data = number.to_bytes(len(values) * bits // 8, "little")
    return [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, len(data), 4)]


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_qweight_is_a_little_endian_bit_stream_along_k_and_comes_back(shape: tuple[int, int, int, int]) -> None:
    bits, units, columns, seed = shape
    q = _random(units * values_per_unit(bits), columns, bits, seed)
    packed = pack_qweight(q, bits)
    assert packed.dtype == torch.int32 and packed.shape == (q.shape[0] * bits // 32, columns)
    for n in range(columns):
        assert packed[:, n].tolist() == _bit_stream(q[:, n].tolist(), bits)
    assert torch.equal(unpack_qweight(packed, bits), q)


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from([1, 2]))
def test_qzeros_come_back_whatever_the_zero_points(shape: tuple[int, int, int, int], version: ZeroVersion) -> None:
    bits, units, groups, seed = shape
    z = _random(groups, units * values_per_unit(bits), bits, seed)
    packed = pack_qzeros(z, bits, version)
    assert packed.dtype == torch.int32 and packed.shape == (groups, z.shape[1] * bits // 32)
    assert torch.equal(unpack_qzeros(packed, bits, version), z)


@pytest.mark.parametrize(("bits", "zero", "word"), [(4, 8, 0x77777777), (8, 128, 0x7F7F7F7F), (2, 2, 0x55555555)])
def test_symmetric_zero_words_are_those_of_the_field(bits: int, zero: int, word: int) -> None:
    z = torch.full((2, 32), zero, dtype=torch.uint8)
    assert set(pack_qzeros(z, bits, 1).flatten().tolist()) == {word}
    unshifted = sum(zero << shift for shift in range(0, 32, bits))
    unshifted -= 2**32 if unshifted >= 2**31 else 0
    assert set(pack_qzeros(z, bits, 2).flatten().tolist()) == {unshifted}


def test_v1_zero_point_0_borrows_from_its_neighbour_and_is_still_exact() -> None:
    z = torch.tensor([[0, 5, 0, 0, 1, 15, 8, 3]], dtype=torch.uint8)
    packed = pack_qzeros(z, 4, 1)
    stored = sum(value << (4 * i) for i, value in enumerate(z[0].tolist()))
    assert int(packed.item()) & 0xFFFFFFFF == (stored - 0x11111111) % 2**32
    assert torch.equal(unpack_qzeros(packed, 4, 1), z)
    by_nibble = torch.tensor([[((int(packed.item()) >> (4 * i)) + 1) & 15 for i in range(8)]], dtype=torch.uint8)
    assert not torch.equal(by_nibble, z)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_qweight(torch.zeros(12, 4, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="does not fit in 3 bits"):
        pack_qweight(torch.full((32, 4), 8, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="bits is one of"):
        unpack_qweight(torch.zeros(4, 4, dtype=torch.int32), 5)
