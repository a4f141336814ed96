"""A file of packed weights: for each Linear a few named tensors as they lie in memory, and numbers beside them.

One page with a magic word and where the table is; the tensors, each from a whole page on; the table as JSON. The table
has a checksum (ext/cpu/checksum.h) of every MiB, which is taken while that is read, so that a damaged file is no
wrong answer.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from gptq_api.checkpoint.large_pages import weight_memory
from gptq_api.checkpoint.pieces import in_pieces
from gptq_api.runner.cpu import native

_MAGIC = b"gptq-api packed 1"
_PROLOGUE = struct.Struct("<24sQQQ")
"""magic; begin, length and checksum of the table"""
_PAGE = 4096
_PIECE = 2**20
_DTYPES = {str(t): t for t in (torch.uint8, torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32)}


@dataclass(frozen=True)
class Packed:
    """What a kernel keeps of one Linear."""

    tensors: dict[str, Tensor]
    numbers: dict[str, int]


class DamagedError(Exception):
    """The file is not what was written; half a sentence."""


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    checks: list[int]


class _Linear(msgspec.Struct, frozen=True):
    tensors: dict[str, _Tensor]
    numbers: dict[str, int]


class _Table(msgspec.Struct, frozen=True):
    key: str
    source: str
    linears: dict[str, _Linear]


class PackedFile:
    """A file as `write` makes it."""

    def __init__(self, fd: int) -> None:
        """Reads the table; `close` closes the descriptor. DamagedError."""
        self._fd = fd
        magic, begin, length, check = _PROLOGUE.unpack(self._bytes(0, _PROLOGUE.size))
        if magic.rstrip(b"\0") != _MAGIC:
            raise DamagedError("it is no file of packed weights")
        data = self._bytes(begin, length)
        if _checksum(data) != check:
            raise DamagedError("its table is not what was written")
        try:
            table = msgspec.json.decode(data, type=_Table)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise DamagedError("its table is one of another version") from None
        self.key, self.source, self._linears = table.key, table.source, table.linears

    def read(self, name: str) -> Packed | None:
        """One Linear, in memory for weights; None for one that the file does not have. DamagedError, MemoryError."""
        linear = self._linears.get(name)
        if linear is None:
            return None
        return Packed({part: self._tensor(tensor) for part, tensor in linear.tensors.items()}, linear.numbers)

    def close(self) -> None:
        os.close(self._fd)

    def _tensor(self, stored: _Tensor) -> Tensor:
        tensor = weight_memory(stored.shape, _DTYPES[stored.dtype])
        data = _memory(tensor)
        if in_pieces(data, _PIECE, lambda at, piece: self._fill(stored.begin + at, piece)) != stored.checks:
            raise DamagedError("its weights are not what was written")
        return tensor

    def _fill(self, begin: int, target: memoryview) -> int:
        """The checksum of what was read."""
        at = 0
        while at < len(target):
            count = os.preadv(self._fd, [target[at:]], begin + at)
            if not count:
                raise DamagedError("it has become shorter")
            at += count
        return _checksum(target)

    def _bytes(self, begin: int, length: int) -> bytearray:
        if begin + length > os.fstat(self._fd).st_size:
            raise DamagedError("it is not complete")
        data = bytearray(length)
        self._fill(begin, memoryview(data))
        return data


def num_bytes(linears: Mapping[str, Packed]) -> int:
    """What `write` will write, nearly."""
    return sum(len(_memory(tensor)) + _PAGE for packed in linears.values() for tensor in packed.tensors.values())


def write(fd: int, key: str, source: str, linears: Mapping[str, Packed]) -> None:
    """OSError where there is no room, and the like."""
    end = _PAGE
    table: dict[str, _Linear] = {}
    for name, packed in linears.items():
        tensors = {}
        for part, tensor in packed.tensors.items():
            data, begin = _memory(tensor), end
            checks = [_write_at(fd, begin + at, data[at : at + _PIECE]) for at in range(0, len(data), _PIECE)]
            tensors[part] = _Tensor(str(tensor.dtype), tuple(tensor.shape), begin, checks)
            end += math.ceil(len(data) / _PAGE) * _PAGE
        table[name] = _Linear(tensors, packed.numbers)
    text = msgspec.json.encode(_Table(key, source, table))
    check = _write_at(fd, end, memoryview(text))
    _write_at(fd, 0, memoryview(_PROLOGUE.pack(_MAGIC, end, len(text), check)))


def _write_at(fd: int, begin: int, data: memoryview) -> int:
    at = 0
    while at < len(data):
        at += os.pwrite(fd, data[at:], begin + at)
    return _checksum(data)


def _checksum(data: memoryview | bytearray) -> int:
    """Other threads run meanwhile."""
    found: int = native.module().checksum(np.frombuffer(data, np.uint8).ctypes.data if len(data) else 0, len(data))
    return found


def _memory(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
