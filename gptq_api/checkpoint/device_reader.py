"""Tensors of safetensors files straight to a CUDA device: threads read pieces into pinned buffers and copy from there,
so that host memory holds a few pieces and never a tensor."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from gptq_api.checkpoint.parts import Region, TensorPart
from gptq_api.checkpoint.safetensors_file import Entry, read_into

_PIECE = 8 * 2**20
_MOST_THREADS = 8
"""of pinned buffers of one piece each; a core copies several GB/s out of the page cache"""


@dataclass(frozen=True)
class Fetch:
    """A tensor on its way."""

    part: TensorPart | None
    """that is read of it"""
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

    def fetch(self, file: Path, name: str, entry: Entry, part: TensorPart | None) -> Fetch:
        """Begin to read a tensor of the file, or a part of it. `name`: for the error."""
        shape, region = entry.shape if part is None else part.shape(entry.shape), entry.region(part)
        tensor = torch.empty(shape, dtype=entry.dtype, device=self.device)
        data, size = tensor.view(-1).view(torch.uint8), region.piece(_PIECE)
        # The allocator may have given memory that kernels already queued on this stream still read.
        usable = torch.cuda.current_stream(self.device).record_event()
        pieces = [
            self._pool.submit(self._read, file, name, region, at, data[at : at + size], usable)
            for at in range(0, len(data), size)
        ]
        return Fetch(part, tensor, pieces)

    def _read(self, file: Path, name: str, region: Region, at: int, target: Tensor, usable: torch.cuda.Event) -> None:
        if not hasattr(self._of_thread, "buffer"):
            self._of_thread.buffer = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
            self._of_thread.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        buffer: Tensor = self._of_thread.buffer[: len(target)]
        stream: torch.cuda.Stream = self._of_thread.stream
        read_into(file, name, region, at, buffer.numpy().data)
        with torch.cuda.stream(stream):
            stream.wait_event(usable)
            target.copy_(buffer, non_blocking=True)
            stream.synchronize()
