"""What GEMMs leave to one another's blocks while they run: device memory that is made once."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from gptq_api.kernels.extension import cuda as _cuda


@cache
def has_wgmma(device_index: int) -> bool:
    return hasattr(_cuda, "wgmma") and torch.cuda.get_device_capability(device_index) == (9, 0)


CAPTURE = -1
_workspaces: dict[tuple[int, int, bool], Tensor] = {}


def prepare_same_bits(device: torch.device) -> None:
    """Before the first `gemm` with `same_bits` on that device that is captured: makes the workspace of such graphs."""
    workspace(torch.cuda.current_device() if device.index is None else device.index, CAPTURE, same_bits=True)


def workspace(device_index: int, stream: int, *, same_bits: bool = False) -> Tensor:
    """Partial sums and flags of the GEMMs by tiles, or of those in the decode kernel's order with `same_bits`, zeroed
    once: one per stream, since launches that overlap cannot share one.

    A graph belongs to the stream on which it is captured, where that has worked kernel by kernel before, as a runner's
    has: it is to be replayed there. All others share that of CAPTURE, which `pack` or `prepare_same_bits` makes before
    any capture begins: no two of them are to be replayed at the same time."""
    found = _workspaces.get((device_index, stream, same_bits))
    if found is None:
        if stream != CAPTURE and torch.cuda.is_current_stream_capturing():
            return workspace(device_index, CAPTURE, same_bits=same_bits)
        device = torch.device("cuda", device_index)
        with torch.cuda.device(device):
            if same_bits:
                size = _cuda.same_bits_workspace_bytes()
            else:
                size = _cuda.wgmma_workspace_bytes() if has_wgmma(device_index) else _cuda.mma_workspace_bytes()
        made = torch.zeros(size, dtype=torch.uint8, device=device)
        found = _workspaces.setdefault((device_index, stream, same_bits), made)
    return found
