"""Memory for weights, which are read from end to end for every token: in pages of 2 MB where the system has them, the
processor looks up few addresses. Asking for that page by page, as allocators would, leaves small weights without."""

from __future__ import annotations

import math
import mmap
import threading

import torch
from torch import Tensor

_PAGE = 2 * 2**20
_ALIGNMENT = 64
_BLOCK = 16 * 2**20


class _Block:
    """Memory that tensors are cut from, one behind the other. It is given back when the last of them is gone."""

    def __init__(self, num_bytes: int) -> None:
        """OSError where the system gives no more."""
        memory = mmap.mmap(-1, num_bytes + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        data = torch.frombuffer(memory, dtype=torch.uint8)
        self._left = data[-data.data_ptr() % _PAGE :]

    def cut(self, num_bytes: int) -> Tensor | None:
        size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        if size > self._left.numel():
            return None
        found, self._left = self._left[:num_bytes], self._left[size:]
        return found


_lock = threading.Lock()
_block: _Block | None = None


def weight_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU, at an address that 64 divides; they become resident when they are written. MemoryError where
    the system gives no more."""
    global _block
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    with _lock:
        found = None if _block is None else _block.cut(num_bytes)
        if found is None:
            try:
                block = _Block(max(num_bytes, _BLOCK))
            except OSError as error:
                raise MemoryError(str(error)) from None
            found = block.cut(num_bytes)
            assert found is not None
            if num_bytes < _BLOCK:
                _block = block
    return found.view(dtype).view(shape)
