"""What a checkpoint's quantization is and whether it is sound, from headers, zero points, scales and g_idx; the
weights are not read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from gptq_api.checkpoint.checkpoint import Checkpoint
from gptq_api.checkpoint.module import ModuleShape, read_groups, read_scales
from gptq_api.checkpoint.zeros import histogram, sniff_zero_version

_MAX_SCALE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Summary:
    """Counts of quantized modules by property."""

    num_modules: int
    bits: dict[int, int]
    group_sizes: dict[int, int]
    """-1: one group"""
    num_act_order: int
    num_sym: int
    zero_versions: dict[str, int]
    """"v1", "v2", or "float" (before 2023-03-20)"""
    zero_points: dict[int, dict[int, int]]
    """bits -> zero point -> how often, in a sample"""
    num_scales_read: int
    """modules whose scales were found finite; large files are only sampled, loading looks at all"""


def summarise(checkpoint: Checkpoint) -> Summary:
    """One pass over the small tensors of every quantized module. CheckpointError, as loading would raise it, for scales
    that are not finite and for a g_idx that is none."""
    bits: Counter[int] = Counter()
    sizes: Counter[int] = Counter()
    versions: Counter[str] = Counter()
    zero_points: dict[int, Counter[int]] = {}
    act_order = sym = scales_read = 0
    read_every = _read_every(checkpoint)
    for index, (module, shape) in enumerate(checkpoint.modules.items()):
        _, size, permuted = read_groups(checkpoint.store, module, shape)
        bits[shape.bits] += 1
        sizes[size if shape.num_groups > 1 else -1] += 1
        act_order += permuted
        if index % read_every == 0:
            read_scales(checkpoint.store, module)
            scales_read += 1
        if shape.float_zeros:
            versions["float"] += 1
            tensors = checkpoint.gptq(module)
            sym += tensors.sym
            found = Counter(tensors.zeros.flatten().tolist())
        else:
            words = checkpoint.store.read(f"{module}.qzeros")
            version = checkpoint.zero_version
            versions[f"v{version}"] += 1
            sym += sniff_zero_version(words, shape.bits) == version
            found = Counter(dict(enumerate(histogram(words, shape.bits, version).tolist())))
        zero_points.setdefault(shape.bits, Counter()).update(found)
    return Summary(
        num_modules=len(checkpoint.modules),
        bits=dict(bits),
        group_sizes=dict(sizes),
        num_act_order=act_order,
        num_sym=sym,
        zero_versions=dict(versions),
        zero_points={b: {z: n for z, n in sorted(c.items()) if n} for b, c in zero_points.items()},
        num_scales_read=scales_read,
    )


def _read_every(checkpoint: Checkpoint) -> int:
    """1: the scales of every module; n: of every n-th, so that a file of any size takes about a second."""
    total = sum(_num_scales(shape) * 2 for shape in checkpoint.modules.values())
    return -(-total // _MAX_SCALE_BYTES)


def _num_scales(shape: ModuleShape) -> int:
    return shape.num_groups * shape.out_features
