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
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptq_api.checkpoint.errors import CheckpointError
from gptq_api.checkpoint.files import refuse_unreadable
from gptq_api.checkpoint.pieces import in_pieces
from gptq_api.on_disk import cannot_be_read

_OS_ERROR = re.compile(
    r"os error (\d{1,3})\b|unable to mmap .{0,9999}\((\d{1,3})\)|can't allocate memory.{0,200}code (\d{1,3})"
)
_OF_THE_SYSTEM = (errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE)
_PIECE = 4 * 2**20
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

    def read(self, name: str, memory: Callable[[tuple[int, ...], torch.dtype], Tensor] = _plain_memory) -> Tensor:
        """The tensor in `memory` of its own. CheckpointError where the file has become shorter or cannot be read."""
        entry = self.entries[name]
        if entry.dtype is None:
            raise CheckpointError(f"{self.path}: tensor {name} is {entry.raw_dtype}, a type that is not read")
        try:
            tensor = memory(entry.shape, entry.dtype)
        except (RuntimeError, MemoryError) as error:
            refused = system_error(error)
            if refused is None:
                raise
            raise CheckpointError(cannot_be_read(self.path, refused)) from None
        if not tensor.numel():
            return tensor
        read_into(self.path, name, entry.begin, tensor.view(-1).view(torch.uint8).numpy().data)
        return tensor


def read_into(path: Path, name: str, begin: int, target: memoryview) -> None:
    """Fill `target` from byte `begin` of the file on, by several threads where it is large. CheckpointError, naming the
    tensor, where that cannot be."""
    in_pieces(target, _PIECE, lambda at, piece: _read_piece(path, name, begin + at, piece))


def _read_piece(path: Path, name: str, begin: int, target: memoryview) -> None:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            while target:
                count = file.readinto(target)
                if not count:
                    raise CheckpointError(
                        f"{path}: tensor {name} cannot be read (it has become shorter); download the file again"
                    )
                target = target[count:]
    except OSError as error:
        raise CheckpointError(cannot_be_read(path, error)) from None


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
