"""Modules with the same input as one: their outputs side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_api.checkpoint.checkpoint import GPTQTensors


def mergeable(modules: list[GPTQTensors]) -> bool:
    """Whether one weight can hold them: the same bits, groups and order of inputs."""
    first = modules[0]
    return all(
        m.bits == first.bits and m.group_size == first.group_size and torch.equal(m.g_idx, first.g_idx)
        for m in modules[1:]
    )


def merge_dense(modules: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Outputs side by side: weights [N, K] and biases [N]."""
    if len(modules) == 1:
        return modules[0]
    return torch.cat([w for w, _ in modules]), _merge_biases([b for _, b in modules], [len(w) for w, _ in modules])


def _merge_biases(biases: list[Tensor | None], sizes: list[int]) -> Tensor | None:
    """float32; zeros where a module has none."""
    given = [b for b in biases if b is not None]
    if not given:
        return None
    device = given[0].device
    return torch.cat(
        [torch.zeros(n, device=device) if b is None else b.float() for b, n in zip(biases, sizes, strict=True)]
    )


def merge(modules: list[GPTQTensors]) -> GPTQTensors:
    """Outputs side by side: every tensor but g_idx has them as its last dimension."""
    first = modules[0]
    if len(modules) == 1:
        return first
    return GPTQTensors(
        qweight=torch.cat([m.qweight for m in modules], 1),
        zeros=torch.cat([m.zeros for m in modules], 1),
        scales=torch.cat([m.scales.float() for m in modules], 1),
        g_idx=first.g_idx,
        bits=first.bits,
        group_size=first.group_size,
        act_order=first.act_order,
        sym=all(m.sym for m in modules),
        zero_version=first.zero_version,
        bias=_merge_biases([m.bias for m in modules], [m.out_features for m in modules]),
    )
