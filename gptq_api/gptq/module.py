"""One quantised Linear: its tensors checked against each other and decoded. Settings are read from the tensors;
nothing here trusts a config. Layout: docstring of packing.py; y = x W^T, W [N, K], `W[n, k] = scales[g, n] * (q[k, n]
- zeros[g, n])` with g = g_idx[k]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gptq_api.gptq.errors import CheckpointError
from gptq_api.gptq.packing import SUPPORTED_BITS, ZeroVersion, unpack_qzeros, values_per_unit
from gptq_api.gptq.tensors import TensorStore

_GROUP_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class GPTQTensors:
    """A quantised Linear with K inputs and N outputs in G groups."""

    qweight: Tensor
    """int32 [K * bits / 32, N], as in the file"""
    zeros: Tensor
    """uint8 [G, N], the true zero points, whatever version the file stores"""
    scales: Tensor
    """[G, N], the file's float type, finite"""
    g_idx: Tensor
    """int32 [K], the group of each input channel"""
    bits: int
    group_size: int
    """-1: one group"""
    act_order: bool
    """g_idx is not k // group_size"""
    sym: bool
    """every zero point is 2 ** (bits - 1)"""
    zero_version: ZeroVersion
    bias: Tensor | None
    """[N]; None where absent or all zeros"""

    @property
    def in_features(self) -> int:
        return self.g_idx.shape[0]

    @property
    def out_features(self) -> int:
        return self.qweight.shape[1]


@dataclass(frozen=True)
class ModuleShape:
    """What the tensor shapes alone say about a module; enough for `inspect` to plan without reading weights."""

    in_features: int
    out_features: int
    bits: int
    num_groups: int


def module_shape(store: TensorStore, module: str) -> ModuleShape:
    """Read from the headers. CheckpointError where tensors are missing or disagree with each other."""
    for part in ("qzeros", "scales"):
        if f"{module}.{part}" not in store:
            hint = _other_layout(store, module)
            raise _bad(store, module, "qweight", f"has no {module}.{part} beside it; {hint}")
    for part in ("qweight", "qzeros"):
        if store.dtype(f"{module}.{part}") != torch.int32:
            raise _bad(
                store, module, part, f"is {store.dtype(f'{module}.{part}')}, GPTQ packs into int32; quantise again"
            )
    dtype = store.dtype(f"{module}.scales")
    if dtype is None or not dtype.is_floating_point:
        raise _bad(store, module, "scales", f"is {dtype} where a float type is expected; quantise again")
    qweight, qzeros, scales = (store.shape(f"{module}.{part}") for part in ("qweight", "qzeros", "scales"))
    if len(qweight) != 2 or len(qzeros) != 2 or len(scales) != 2 or 0 in qweight + qzeros + scales:
        raise _bad(
            store, module, "qweight", f"has shape {qweight} with qzeros {qzeros} and scales {scales}; download again"
        )
    num_groups, out_features = scales
    if qweight[1] == qzeros[1] and out_features == 8 * qweight[1] and qzeros[0] == num_groups:
        raise _bad(
            store, module, "qweight", "is packed along the outputs: an AWQ checkpoint; use a GPTQ one of the model"
        )
    if qweight[1] != out_features or qzeros[0] != num_groups:
        raise _bad(
            store, module, "qweight", f"{qweight} does not fit qzeros {qzeros} and scales {scales}; download again"
        )
    bits, rest = divmod(qzeros[1] * 32, out_features)
    if rest or bits not in SUPPORTED_BITS or out_features % values_per_unit(bits):
        raise _bad(
            store,
            module,
            "qzeros",
            f"{qzeros} gives no bit width in {SUPPORTED_BITS} for {out_features} outputs; quantise again",
        )
    in_features, rest = divmod(qweight[0] * 32, bits)
    if rest or in_features % values_per_unit(bits) or num_groups > in_features:
        raise _bad(
            store,
            module,
            "qweight",
            f"{qweight} does not hold whole {bits}-bit rows in {num_groups} groups; download again",
        )
    if f"{module}.g_idx" in store:
        shape, dtype = store.shape(f"{module}.g_idx"), store.dtype(f"{module}.g_idx")
        if shape != (in_features,) or dtype not in (torch.int32, torch.int64):
            fused = (
                " (of a fused module?)" if len(shape) == 1 and shape[0] in (2 * in_features, 3 * in_features) else ""
            )
            raise _bad(
                store,
                module,
                "g_idx",
                f"is {dtype} {shape}{fused} where int32 ({in_features},) is expected; quantise again",
            )
    if f"{module}.bias" in store and store.shape(f"{module}.bias") != (out_features,):
        raise _bad(
            store, module, "bias", f"has shape {store.shape(f'{module}.bias')}, not ({out_features},); download again"
        )
    return ModuleShape(in_features, out_features, bits, num_groups)


def read_module(store: TensorStore, module: str, default_version: ZeroVersion) -> GPTQTensors:
    """Decode one module. `default_version` is used where the zero points themselves do not show their version.

    CheckpointError naming the tensor for non-finite scales, g_idx out of range or unbalanced, and all of
    `module_shape`.
    """
    shape = module_shape(store, module)
    scales = store.read(f"{module}.scales").clone()
    if not bool(torch.isfinite(scales).all()):
        raise _bad(store, module, "scales", "holds NaN or infinity; download the file again or quantise again")
    words = store.read(f"{module}.qzeros")
    version = sniff_zero_version(words, shape.bits) or default_version
    zeros = unpack_qzeros(words, shape.bits, version)
    g_idx, group_size, act_order = _groups(store, module, shape)
    return GPTQTensors(
        qweight=store.read(f"{module}.qweight"),
        zeros=zeros,
        scales=scales,
        g_idx=g_idx,
        bits=shape.bits,
        group_size=group_size,
        act_order=act_order,
        sym=bool((zeros == 1 << (shape.bits - 1)).all()),
        zero_version=version,
        bias=read_bias(store, module),
    )


def sniff_zero_version(qzeros: Tensor, bits: int) -> Literal[1, 2] | None:
    """Symmetric zeros show their version: all stored values 2**(bits-1) is v2, all one less is v1. Else None."""
    stored = unpack_qzeros(qzeros, bits, 2)
    first = int(stored.flatten()[0])
    middle = 1 << (bits - 1)
    if first in (middle, middle - 1) and bool((stored == first).all()):
        return 2 if first == middle else 1
    return None


def read_bias(store: TensorStore, module: str) -> Tensor | None:
    """None where there is no bias or it is all zeros (AutoGPTQ wrote zeros for every module until March 2024)."""
    if f"{module}.bias" not in store:
        return None
    bias = store.read(f"{module}.bias").clone()
    if not bool(torch.isfinite(bias).all()):
        raise _bad(store, module, "bias", "holds NaN or infinity; download the file again")
    return bias if bool(bias.any()) else None


def infer_group_size(in_features: int, num_groups: int) -> int | None:
    """-1 for one group; else the power of two (or exact divisor) that gives num_groups; None where none does."""
    if num_groups == 1:
        return -1
    for size in _GROUP_SIZES:
        if -(-in_features // size) == num_groups:
            return size
    return in_features // num_groups if in_features % num_groups == 0 else None


def is_permuted(store: TensorStore, module: str, shape: ModuleShape) -> bool:
    """Whether g_idx scrambles the groups (act-order); reads g_idx alone."""
    name = f"{module}.g_idx"
    if shape.num_groups == 1 or name not in store:
        return False
    g_idx = store.read(name)
    return bool(g_idx.any()) and bool((g_idx[1:] < g_idx[:-1]).any())


def _groups(store: TensorStore, module: str, shape: ModuleShape) -> tuple[Tensor, int, bool]:
    """(g_idx, group_size, act_order). Tensors of all zeros although there are groups come from 2023 writers:
    sequential."""
    k, num_groups = shape.in_features, shape.num_groups
    g_idx = store.read(f"{module}.g_idx").to(torch.int32, copy=True) if f"{module}.g_idx" in store else None
    if g_idx is None or not bool(g_idx.any()):
        size = infer_group_size(k, num_groups)
        if size is None:
            raise _bad(
                store,
                module,
                "scales",
                f"has {num_groups} groups, which no group size gives for {k} inputs; quantise again",
            )
        return torch.arange(k, dtype=torch.int32) // (size if size > 0 else k), size, False
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= num_groups:
        raise _bad(
            store, module, "g_idx", f"names group {low if low < 0 else high} of {num_groups}; download the file again"
        )
    counts = torch.bincount(g_idx, minlength=num_groups)
    size = int(counts.max())
    if -(-k // size) != num_groups or bool((counts[:-1] != size).any()):
        raise _bad(store, module, "g_idx", f"does not give {num_groups} groups of equal size; download the file again")
    act_order = not bool((g_idx == torch.arange(k, dtype=torch.int32) // size).all())
    return g_idx, size, act_order


def _other_layout(store: TensorStore, module: str) -> str:
    if f"{module}.zeros" in store:
        return "a checkpoint of GPTQ-for-LLaMa before 2023-03-20, which is not read yet; quantise again"
    return "download the file again"


def _bad(store: TensorStore, module: str, part: str, what: str) -> CheckpointError:
    name = f"{module}.{part}"
    return CheckpointError(f"{store.file(name)}: tensor {name} {what}")
