"""One quantized Linear: its tensors checked against each other and decoded. Settings are read from the tensors;
nothing here trusts a config. Layout: docstring of packing.py; y = x W^T, W [N, K], `W[n, k] = scales[g, n] * (q[k, n]
- zeros[g, n])` with g = g_idx[k]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_api.checkpoint.errors import CheckpointError
from gptq_api.checkpoint.foreign import foreign_module
from gptq_api.checkpoint.packing import SUPPORTED_BITS, ZeroVersion, unpack_qzeros, values_per_unit
from gptq_api.checkpoint.parts import TensorPart
from gptq_api.checkpoint.tensors import TensorStore
from gptq_api.checkpoint.zeros import whole_zeros

_GROUP_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class GPTQTensors:
    """A quantized Linear with K inputs and N outputs in G groups."""

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
    zero_version: ZeroVersion | None
    """None: float zeros, as of before 2023-03-20"""
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
    float_zeros: bool = False
    """GPTQ-for-LLaMa before 2023-03-20: no qzeros but `zeros` = zero * scale, both float [N, 1]"""


def module_shape(store: TensorStore, module: str) -> ModuleShape:
    """Read from the headers. CheckpointError where tensors are missing or disagree with each other."""
    foreign = foreign_module(store, module)
    if foreign is not None:
        raise _bad(store, module, "qweight", foreign)
    if f"{module}.qzeros" not in store and f"{module}.zeros" in store:
        shape = _shape_of_march_2023(store, module)
    else:
        shape = _shape(store, module)
    if f"{module}.g_idx" in store:
        _check_g_idx(store, module, shape.in_features)
    if f"{module}.bias" in store and store.shape(f"{module}.bias") != (shape.out_features,):
        found = store.shape(f"{module}.bias")
        raise _bad(store, module, "bias", f"has shape {found}, not ({shape.out_features},); download again")
    return shape


def _shape(store: TensorStore, module: str) -> ModuleShape:
    for part in ("qzeros", "scales"):
        if f"{module}.{part}" not in store:
            raise _bad(store, module, "qweight", f"has no {module}.{part} beside it; download the file again")
    _check_types(store, module, ("qweight", "qzeros"), ("scales",))
    qweight, qzeros, scales = (store.shape(f"{module}.{part}") for part in ("qweight", "qzeros", "scales"))
    if len(qweight) != 2 or len(qzeros) != 2 or len(scales) != 2 or 0 in qweight + qzeros + scales:
        raise _bad(
            store, module, "qweight", f"has shape {qweight} with qzeros {qzeros} and scales {scales}; download again"
        )
    num_groups, out_features = scales
    if qweight[1] != out_features or qzeros[0] != num_groups:
        raise _bad(
            store, module, "qweight", f"{qweight} does not fit qzeros {qzeros} and scales {scales}; download again"
        )
    bits, rest = divmod(qzeros[1] * 32, out_features)
    if rest or bits not in SUPPORTED_BITS or out_features % values_per_unit(bits):
        lost = any(out_features // 256 * 8 * b == qzeros[1] for b in SUPPORTED_BITS)
        remedy = "its writer lost the last zero points (GPTQ-for-LLaMa of March 2023); " if lost else ""
        raise _bad(
            store,
            module,
            "qzeros",
            f"{qzeros} gives no bit width in {SUPPORTED_BITS} for {out_features} outputs; {remedy}quantize again",
        )
    in_features, rest = divmod(qweight[0] * 32, bits)
    if rest or in_features % values_per_unit(bits) or num_groups > in_features:
        raise _bad(
            store,
            module,
            "qweight",
            f"{qweight} does not hold whole {bits}-bit rows in {num_groups} groups; download again",
        )
    return ModuleShape(in_features, out_features, bits, num_groups)


def _shape_of_march_2023(store: TensorStore, module: str) -> ModuleShape:
    """One group, no qzeros to count bits by: the number of inputs is that of the neighbours in the model."""
    if f"{module}.scales" not in store:
        raise _bad(store, module, "qweight", f"has no {module}.scales beside it; download the file again")
    _check_types(store, module, ("qweight",), ("scales", "zeros"))
    qweight, scales, zeros = (store.shape(f"{module}.{part}") for part in ("qweight", "scales", "zeros"))
    if len(qweight) != 2 or 0 in qweight or scales != (qweight[1], 1) or zeros != scales:
        raise _bad(
            store, module, "qweight", f"{qweight} does not fit zeros {zeros} and scales {scales}; download again"
        )
    in_features = _num_inputs(store, module)
    bits, rest = divmod(qweight[0] * 32, in_features) if in_features else (0, 0)
    if rest or bits not in SUPPORTED_BITS or in_features % values_per_unit(bits):
        raise _bad(
            store,
            module,
            "qweight",
            f"{qweight} holds no rows of {in_features} inputs of {SUPPORTED_BITS} bits, and without qzeros (before "
            "2023-03-20) nothing else tells; quantize again",
        )
    return ModuleShape(in_features, qweight[1], bits, 1, float_zeros=True)


def _num_inputs(store: TensorStore, module: str) -> int:
    """The inputs of a module of a LLaMA, from the outputs of whatever feeds it; 0 where that is not there."""
    stem, _, kind = module.rpartition(".")
    for source, axis in {
        "o_proj": ((f"{stem}.q_proj.qweight", 1), (f"{stem}.q_proj.weight", 0)),
        "down_proj": ((f"{stem}.up_proj.qweight", 1), (f"{stem}.up_proj.weight", 0)),
    }.get(kind, (("model.embed_tokens.weight", 1),)):
        if source in store and len(store.shape(source)) == 2:
            return store.shape(source)[axis]
    return 0


def _check_types(store: TensorStore, module: str, words: tuple[str, ...], floats: tuple[str, ...]) -> None:
    for part in words:
        if store.dtype(f"{module}.{part}") != torch.int32:
            found = store.dtype_name(f"{module}.{part}")
            raise _bad(
                store, module, part, f"is {found}, and only words of int32 (pack_dtype int32) are read; quantize again"
            )
    for part in floats:
        if not store.is_float(f"{module}.{part}"):
            found = store.dtype_name(f"{module}.{part}")
            raise _bad(store, module, part, f"is {found} where a float type is expected; quantize again")


def _check_g_idx(store: TensorStore, module: str, in_features: int) -> None:
    shape, dtype = store.shape(f"{module}.g_idx"), store.dtype(f"{module}.g_idx")
    if shape == (in_features,) and dtype in (torch.int32, torch.int64):
        return
    fused = ""
    if len(shape) == 1 and shape[0] in (2 * in_features, 3 * in_features):
        fused = " (those of a fused module, saved from a running server)"
    found = store.dtype_name(f"{module}.g_idx")
    raise _bad(
        store, module, "g_idx", f"is {found} {shape}{fused} where int32 ({in_features},) is expected; quantize again"
    )


Outputs = tuple[range, ...]
"""of a Linear, one range behind another"""


def parts_of(module: str, shape: ModuleShape, outputs: Outputs) -> dict[str, TensorPart]:
    """What `read_module` reads of the module's tensors for these outputs; of those that are not named, all."""
    if shape.float_zeros:
        by_rows = TensorPart(0, outputs)
        return {f"{module}.qweight": TensorPart(1, outputs), f"{module}.scales": by_rows, f"{module}.zeros": by_rows}
    words = tuple(_zero_words(each, shape.bits) for each in outputs)
    by_columns = TensorPart(1, outputs)
    return {f"{module}.qweight": by_columns, f"{module}.scales": by_columns, f"{module}.qzeros": TensorPart(1, words)}


def _zero_words(outputs: range, bits: int) -> range:
    """The words of a row of qzeros that hold the zero points of these outputs, and maybe some of their neighbours."""
    unit = values_per_unit(bits)
    first, end = outputs.start // unit, -(-outputs.stop // unit)
    return range(first * unit * bits // 32, end * unit * bits // 32)


def _zeros_of(words: Tensor, bits: int, version: ZeroVersion, outputs: Outputs) -> Tensor:
    """The zero points [G, N] of these outputs from their words."""
    found, unit, at, ranges = unpack_qzeros(words, bits, version), values_per_unit(bits), 0, list[range]()
    for each in outputs:
        first = at + each.start % unit
        ranges.append(range(first, first + len(each)))
        at += len(_zero_words(each, bits)) * 32 // bits
    return TensorPart(1, tuple(ranges)).of(found).contiguous()


def read_module(
    store: TensorStore, module: str, shape: ModuleShape, zero_version: ZeroVersion, outputs: Outputs | None = None
) -> GPTQTensors:
    """Decode one module, its zero points as of `zero_version`, which is one for the checkpoint. `outputs`: read these
    alone; None: all.

    CheckpointError naming the tensor for non-finite scales, zero points that are none, g_idx out of range or
    unbalanced.
    """
    parts = {} if outputs is None else parts_of(module, shape, outputs)
    scales = read_scales(store, module, parts.get(f"{module}.scales"))
    version = None if shape.float_zeros else zero_version
    if shape.float_zeros:
        zeros = _read_float_zeros(store, module, shape, scales, parts.get(f"{module}.zeros"))
        scales = scales.t().contiguous()
    else:
        words = store.read(f"{module}.qzeros", parts.get(f"{module}.qzeros"))
        if outputs is None:
            zeros = unpack_qzeros(words, shape.bits, zero_version)
        else:
            zeros = _zeros_of(words, shape.bits, zero_version, outputs)
    g_idx, group_size, act_order = read_groups(store, module, shape)
    return GPTQTensors(
        qweight=store.read(f"{module}.qweight", parts.get(f"{module}.qweight")),
        zeros=zeros,
        scales=scales,
        g_idx=g_idx,
        bits=shape.bits,
        group_size=group_size,
        act_order=act_order,
        sym=bool((zeros == 1 << (shape.bits - 1)).all()),
        zero_version=version,
        bias=read_bias(store, module, outputs),
    )


def read_scales(store: TensorStore, module: str, part: TensorPart | None = None) -> Tensor:
    """As in the file, and finite."""
    scales = store.own(f"{module}.scales", part)
    # A NaN survives minimum and maximum, and this is several times faster than isfinite on float16.
    low, high = scales.aminmax()
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise _bad(store, module, "scales", "holds NaN or infinity; download the file again or quantize again")
    return scales


def _read_float_zeros(
    store: TensorStore, module: str, shape: ModuleShape, scales: Tensor, part: TensorPart | None
) -> Tensor:
    zeros = store.read(f"{module}.zeros", part)
    if not bool(torch.isfinite(zeros).all()):
        raise _bad(store, module, "zeros", "holds NaN or infinity; download the file again or quantize again")
    whole = whole_zeros(zeros, scales, shape.bits)
    if whole is None:
        top = (1 << shape.bits) - 1
        raise _bad(
            store, module, "zeros", f"are no zero points from 0 to {top} times their scales; download the file again"
        )
    return whole


def read_bias(store: TensorStore, module: str, outputs: Outputs | None = None) -> Tensor | None:
    """None where there is no bias or it is all zeros (AutoGPTQ wrote zeros for every module until March 2024), whatever
    outputs are asked for."""
    if f"{module}.bias" not in store:
        return None
    if not store.is_float(f"{module}.bias"):
        raise _bad(store, module, "bias", f"is {store.dtype_name(f'{module}.bias')}, no float type; quantize again")
    bias = store.own(f"{module}.bias")
    if not bool(torch.isfinite(bias).all()):
        raise _bad(store, module, "bias", "holds NaN or infinity; download the file again")
    if not bool(bias.any()):
        return None
    return bias if outputs is None else TensorPart(0, outputs).of(bias).contiguous()


def infer_group_size(in_features: int, num_groups: int) -> int | None:
    """-1 for one group; else the power of two (or exact divisor) that gives num_groups; None where none does."""
    if num_groups == 1:
        return -1
    for size in _GROUP_SIZES:
        if -(-in_features // size) == num_groups:
            return size
    return in_features // num_groups if in_features % num_groups == 0 else None


def group_size_of(shape: ModuleShape) -> int:
    """As far as the shapes tell; -1: one group."""
    return infer_group_size(shape.in_features, shape.num_groups) or shape.in_features // shape.num_groups


def is_permuted(store: TensorStore, module: str, shape: ModuleShape) -> bool:
    """Whether g_idx scrambles the groups (act-order); reads g_idx alone."""
    name = f"{module}.g_idx"
    if shape.num_groups == 1 or name not in store:
        return False
    g_idx = store.read(name)
    return bool(g_idx.any()) and bool((g_idx[1:] < g_idx[:-1]).any())


def read_groups(store: TensorStore, module: str, shape: ModuleShape) -> tuple[Tensor, int, bool]:
    """(g_idx int32 [K], group_size, act_order). A g_idx of all zeros although there are groups comes from writers of
    2023 and means sequential."""
    k, num_groups = shape.in_features, shape.num_groups
    g_idx = store.read(f"{module}.g_idx") if f"{module}.g_idx" in store else None
    if g_idx is None or not bool(g_idx.any()):
        size = infer_group_size(k, num_groups)
        if size is None:
            raise _bad(
                store,
                module,
                "scales",
                f"has {num_groups} groups, which no group size gives for {k} inputs; quantize again",
            )
        positions = torch.arange(k, dtype=torch.int32, device=store.device)
        return positions // (size if size > 0 else k), size, False
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= num_groups:
        raise _bad(
            store, module, "g_idx", f"names group {low if low < 0 else high} of {num_groups}; download the file again"
        )
    g_idx = g_idx.to(torch.int32, copy=True)
    counts = torch.bincount(g_idx, minlength=num_groups)
    size = int(counts.max())
    if -(-k // size) != num_groups or bool((counts[:-1] != size).any()):
        raise _bad(store, module, "g_idx", f"does not give {num_groups} groups of equal size; download the file again")
    sequential = torch.arange(k, dtype=torch.int32, device=g_idx.device) // size
    act_order = not bool((g_idx == sequential).all())
    return g_idx, size, act_order


def _bad(store: TensorStore, module: str, part: str, what: str) -> CheckpointError:
    name = f"{module}.{part}"
    return CheckpointError(f"{store.file(name)}: tensor {name} {what}")
