"""The gate of LLaMA's feed-forward network (SwiGLU, arXiv:2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """[M, 2F], gate then up -> silu(gate) * up, [M, F], computed in float32 or better."""
    # torch's CPU silu computes an element by vector or by scalar code depending on where the threads' shares end, and
    # the two differ in the last bit: a row would depend on the number of rows. exp and division do not.
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    return torch.mul(gate, up).div_(gate.neg().exp_().add_(1.0)).to(gate_up.dtype)
