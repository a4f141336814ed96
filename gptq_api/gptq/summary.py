"""What a checkpoint's quantisation is, from headers, zero points and g_idx; the weights are not read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from gptq_api.gptq.checkpoint import Checkpoint
from gptq_api.gptq.module import infer_group_size, is_permuted, sniff_zero_version


@dataclass(frozen=True)
class Summary:
    """Counts of quantised modules by property."""

    num_modules: int
    bits: dict[int, int]
    group_sizes: dict[int, int]
    """-1: one group"""
    num_act_order: int
    num_sym: int
    zero_versions: dict[int, int]


def summarise(checkpoint: Checkpoint) -> Summary:
    """One pass over the small tensors of every quantised module."""
    bits: Counter[int] = Counter()
    sizes: Counter[int] = Counter()
    versions: Counter[int] = Counter()
    act_order = sym = 0
    for module, shape in checkpoint.modules.items():
        bits[shape.bits] += 1
        sizes[infer_group_size(shape.in_features, shape.num_groups) or shape.in_features // shape.num_groups] += 1
        act_order += is_permuted(checkpoint.store, module, shape)
        shown = sniff_zero_version(checkpoint.store.read(f"{module}.qzeros"), shape.bits)
        sym += shown is not None
        versions[shown or checkpoint.default_zero_version] += 1
    return Summary(len(checkpoint.modules), dict(bits), dict(sizes), act_order, sym, dict(versions))
