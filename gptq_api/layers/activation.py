"""The gate of LLaMA's feed-forward network (SwiGLU, arXiv:2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """[M, 2F], gate then up -> silu(gate) * up, [M, F]."""
    gate, up = gate_up.chunk(2, -1)
    if gate_up.is_cuda:
        return functional.silu(gate).mul_(up)
    # torch's CPU silu computes an element by vector or by scalar code depending on where the threads' shares end, and
    # the two differ in the last bit: a row would depend on the number of rows. exp and division do not.
    return torch.mul(gate, up).div_(gate.neg().exp_().add_(1.0))
