"""Tensors of safetensors files straight to a CUDA device: threads read pieces into pinned buffers and copy from there,
so that host memory holds a few pieces and never a tensor."""

from __future__ import annotations

import math
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from gptq_api.checkpoint.safetensors_file import read_into

_PIECE = 8 * 2**20
_MOST_THREADS = 8
"""of pinned buffers of one piece each; a core copies several GB/s out of the page cache"""


@dataclass(frozen=True)
class Fetch:
    """A tensor on its way."""

    tensor: Tensor
    pieces: list[Future[None]]

    def wait(self) -> Tensor:
        """CheckpointError where the file has become shorter or cannot be read."""
        for piece in self.pieces:
            piece.result()
        return self.tensor


class DeviceReader:
    """Use in a `with` block; leaving it ends the threads and gives the pinned memory back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0))), "gptq-api-read")
        self._of_thread = threading.local()

    def __enter__(self) -> DeviceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def fetch(self, file: Path, name: str, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> Fetch:
        """Begin to read the tensor that starts at byte `begin` of the file. `name`: for the error."""
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        num_bytes = math.prod(shape) * dtype.itemsize
        data = tensor.view(-1).view(torch.uint8)
        # The allocator may have given memory that kernels already queued on this stream still read.
        usable = torch.cuda.current_stream(self.device).record_event()
        pieces = [
            self._pool.submit(self._read, file, name, begin + at, data[at : at + _PIECE], usable)
            for at in range(0, num_bytes, _PIECE)
        ]
        return Fetch(tensor, pieces)

    def _read(self, file: Path, name: str, begin: int, target: Tensor, usable: torch.cuda.Event) -> None:
        if not hasattr(self._of_thread, "buffer"):
            self._of_thread.buffer = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
            self._of_thread.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        buffer: Tensor = self._of_thread.buffer[: len(target)]
        stream: torch.cuda.Stream = self._of_thread.stream
        read_into(file, name, begin, buffer.numpy().data)
        with torch.cuda.stream(stream):
            stream.wait_event(usable)
            target.copy_(buffer, non_blocking=True)
            stream.synchronize()
