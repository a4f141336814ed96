"""One safetensors file: the library checks it and reads its header, the data is read by position.

Reading instead of mapping: a mapped file that shrinks kills the process, one larger than memory may not be mapped at
all, and a page fault per 4 KiB costs several times what a read does.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptq_api.checkpoint.errors import CheckpointError
from gptq_api.checkpoint.files import refuse_unreadable
from gptq_api.checkpoint.parts import Region, TensorPart
from gptq_api.checkpoint.pieces import in_pieces
from gptq_api.on_disk import cannot_be_read

_OS_ERROR = re.compile(
    r"os error (\d{1,3})\b|unable to mmap .{0,9999}\((\d{1,3})\)|can't allocate memory.{0,200}code (\d{1,3})"
)
_OF_THE_SYSTEM = (errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE)
_PIECE = 4 * 2**20
_ROOM = 2**20
"""bytes of rows that are read whole, of which a part is kept: they are still in the processor's cache then"""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """A tensor as the header describes it."""

    shape: tuple[int, ...]
    raw_dtype: str
    """as the header calls it"""
    begin: int
    """position of its data in the file, bytes"""

    @property
    def dtype(self) -> torch.dtype | None:
        """None for a type that GPTQ checkpoints do not use."""
        return _DTYPES.get(self.raw_dtype)

    def region(self, part: TensorPart | None) -> Region:
        """Where its data is, or that of a part. For types that `dtype` knows."""
        assert self.dtype is not None
        return Region.of(self.begin, self.shape, self.dtype.itemsize, part)


def _plain_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


class SafetensorsFile:
    """Header of the file at `path`; its data is read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_unreadable(path)
        try:
            # As numpy: torch would map the file writable, for which there must be memory.
            with safe_open(str(path), framework="numpy"):
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, MemoryError, RuntimeError, ValueError) as error:
            refused = system_error(error)
            if refused is not None:
                raise CheckpointError(cannot_be_read(path, refused)) from None
            raise CheckpointError(
                f"{path} is not a complete safetensors file ({first_line(error)}); download it again"
            ) from None
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.entries = {
            name: Entry(tuple(value["shape"]), value["dtype"], 8 + length + value["data_offsets"][0])
            for name, value in header.items()
        }

    def read(
        self,
        name: str,
        memory: Callable[[tuple[int, ...], torch.dtype], Tensor] = _plain_memory,
        part: TensorPart | None = None,
    ) -> Tensor:
        """The tensor, or a part of it, in `memory` of its own. CheckpointError where the file has become shorter or
        cannot be read."""
        entry = self.entries[name]
        if entry.dtype is None:
            raise CheckpointError(f"{self.path}: tensor {name} is {entry.raw_dtype}, a type that is not read")
        try:
            tensor = memory(entry.shape if part is None else part.shape(entry.shape), entry.dtype)
        except (RuntimeError, MemoryError) as error:
            refused = system_error(error)
            if refused is None:
                raise
            raise CheckpointError(cannot_be_read(self.path, refused)) from None
        if not tensor.numel():
            return tensor
        read_into(self.path, name, entry.region(part), 0, tensor.view(-1).view(torch.uint8).numpy().data)
        return tensor


def read_into(path: Path, name: str, region: Region, at: int, target: memoryview) -> None:
    """Fill `target` with the bytes of a region from its `at`-th on, by several threads where they are many.
    CheckpointError, naming the tensor, where that cannot be."""
    in_pieces(target, region.piece(_PIECE), lambda begin, piece: _read_piece(path, name, region, at + begin, piece))


def _read_piece(path: Path, name: str, region: Region, at: int, target: memoryview) -> None:
    try:
        with path.open("rb", buffering=0) as file:
            if region.reads_through and at % region.row_bytes == len(target) % region.row_bytes == 0:
                _read_rows(file, region, at // region.row_bytes, target)
                return
            done = 0
            for position, length in region.runs_from(at, len(target)):
                _fill(file, position, target[done : done + length])
                done += length
    except EOFError:
        raise CheckpointError(
            f"{path}: tensor {name} cannot be read (it has become shorter); download the file again"
        ) from None
    except OSError as error:
        raise CheckpointError(cannot_be_read(path, error)) from None


def _read_rows(file: FileIO, region: Region, first: int, target: memoryview) -> None:
    """The runs of rows that are read whole."""
    kept = np.frombuffer(target, np.uint8).reshape(-1, region.row_bytes)
    each = max(1, _ROOM // region.stride)
    room = np.empty((min(each, len(kept)), region.stride), np.uint8)
    for begin in range(0, len(kept), each):
        rows = room[: len(kept) - begin]
        _fill(file, region.begin + (first + begin) * region.stride, rows.reshape(-1).data)
        column = 0
        for where, length in region.runs:
            kept[begin : begin + each, column : column + length] = rows[:, where : where + length]
            column += length


def _fill(file: FileIO, position: int, target: memoryview) -> None:
    """EOFError where the file ends before."""
    while target:
        count = os.preadv(file.fileno(), [target], position)
        if not count:
            raise EOFError
        target, position = target[count:], position + count


def system_error(error: BaseException) -> OSError | None:
    """What the system refused, whatever the file holds, where that is what a library's error is about: both libraries
    map files, and say "Cannot allocate memory" and the like in errors of their own."""
    found = _OS_ERROR.search(str(error))
    number = int(next(filter(None, found.groups()), 0)) if found else 0
    if isinstance(error, MemoryError):
        number = errno.ENOMEM
    elif isinstance(error, OSError) and error.errno:
        number = error.errno
    return OSError(number, os.strerror(number)) if number in _OF_THE_SYSTEM else None


def first_line(error: BaseException) -> str:
    """What a library says went wrong, for a sentence of ours."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
