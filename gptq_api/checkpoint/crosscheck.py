"""What configs and flags claim, held against the tensors: a config that is wrong is a warning, a flag is an error."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gptq_api.checkpoint.claims import ClaimTable
from gptq_api.checkpoint.errors import CheckpointError
from gptq_api.checkpoint.module import ModuleShape, infer_group_size, is_permuted
from gptq_api.checkpoint.packing import ZeroVersion
from gptq_api.checkpoint.quant_config import QuantConfig
from gptq_api.checkpoint.tensors import TensorStore
from gptq_api.checkpoint.zeros import ZeroStatistics, histogram, sniff_zero_version


@dataclass(frozen=True)
class Expected:
    """What the user's flags claim (--gptq-wbits, --gptq-groupsize, --gptq-act-order); None: no claim."""

    bits: int | None = None
    group_size: int | None = None
    act_order: bool | None = None


@dataclass(frozen=True)
class Zeros:
    """What the zero points of all modules together say."""

    default_version: ZeroVersion
    """for modules that do not show their own"""
    shown: dict[str, ZeroVersion]
    """the modules that do"""
    warnings: tuple[str, ...]


def look_at_zeros(store: TensorStore, shapes: dict[str, ModuleShape], config: QuantConfig) -> Zeros:
    """The zero version, and warnings where the tensors contradict the config or look like neither version."""
    packed = {module: shape for module, shape in shapes.items() if not shape.float_zeros}
    shown: dict[str, ZeroVersion] = {}
    for module, shape in packed.items():
        version = sniff_zero_version(store.read(f"{module}.qzeros"), shape.bits)
        if version is not None:
            shown[module] = version
    found = set(shown.values())
    warnings = []
    claimed: ZeroVersion | None = config.zero_version or (1 if config.source else None)
    if found and claimed is not None and found != {claimed}:
        said = f"{config.source} says" if config.zero_version else f"{config.source} says nothing, which means"
        warnings.append(f"{said} zero points are v{claimed} but the tensors show v{3 - claimed}; the tensors decide")
    default: ZeroVersion = config.zero_version or (found.pop() if len(found) == 1 else 1)
    counts: dict[int, torch.Tensor] = {}
    for module, shape in packed.items():
        if module not in shown:
            new = histogram(store.read(f"{module}.qzeros"), shape.bits, default)
            counts[shape.bits] = counts[shape.bits] + new if shape.bits in counts else new
    for bits, total in sorted(counts.items()):
        complaint = ZeroStatistics(bits, default, total).complaint()
        if complaint is not None:
            warnings.append(complaint)
    return Zeros(default, shown, tuple(warnings))


def contradictions(store: TensorStore, shapes: dict[str, ModuleShape], config: QuantConfig, zeros: Zeros) -> list[str]:
    """One warning for each kind of claim that the tensors contradict, naming the first module that does."""
    if config.source is None:
        return []
    warnings: dict[str, str] = {}
    table = ClaimTable(config.claim, config.rules)
    for module, shape in shapes.items():
        claim = table.of(module)
        if claim.quantized is False:
            warnings.setdefault("quantized", f"{module} is not quantized but it is")
        if claim.bits not in (None, shape.bits):
            warnings.setdefault("bits", f"{claim.bits} bits but {module} has {shape.bits}")
        if claim.group_size is not None and not _fits(shape, claim.group_size):
            warnings.setdefault("group", f"group size {claim.group_size} but {module} has {_describe_group(shape)}")
        if claim.desc_act is False and is_permuted(store, module, shape):
            warnings.setdefault("order", f"desc_act is false but g_idx is permuted in {module}")
        if claim.sym is True and module not in zeros.shown and not shape.float_zeros:
            warnings.setdefault("sym", f"sym is true but the zero points of {module} differ")
    if config.lm_head is not None and config.lm_head != ("lm_head" in shapes) and not config.rules:
        state = "is" if config.lm_head else "is not"
        warnings["head"] = f"lm_head {state} quantized but the file has it otherwise"
    if table.gave_up:
        warnings["time"] = "dynamic patterns that take too long to match"
    return [f"{config.source} says {text}; the tensors decide" for text in warnings.values()]


def check_flags(store: TensorStore, shapes: dict[str, ModuleShape], config: QuantConfig, expected: Expected) -> None:
    """CheckpointError where a flag contradicts any module."""
    file = store.weights.files[0]
    for module, shape in shapes.items():
        if expected.bits is not None and shape.bits != expected.bits:
            raise CheckpointError(
                f"--gptq-wbits {expected.bits} contradicts {file}: {module} has {shape.bits} bits; leave the flag out"
            )
        if expected.group_size is not None and not _fits(shape, expected.group_size):
            raise CheckpointError(
                f"--gptq-groupsize {expected.group_size} contradicts {file}: {module} has {_describe_group(shape)}; "
                "leave the flag out"
            )
    if expected.act_order is None:
        return
    permuted = [module for module, shape in shapes.items() if is_permuted(store, module, shape)]
    if expected.act_order and not permuted:
        # Act-order with one group or static groups leaves no trace in g_idx, and a writer's config may still say so.
        if config.claim.desc_act is True or all(shape.num_groups == 1 for shape in shapes.values()):
            return
        raise CheckpointError(
            f"--gptq-act-order contradicts {file}: g_idx is sequential everywhere; leave the flag out"
        )
    if not expected.act_order and permuted:
        raise CheckpointError(
            f"--no-gptq-act-order contradicts {file}: {permuted[0]}.g_idx is permuted (act-order); leave the flag out"
        )


def _fits(shape: ModuleShape, group_size: int) -> bool:
    size = group_size if group_size > 0 else shape.in_features
    return -(-shape.in_features // size) == shape.num_groups


def _describe_group(shape: ModuleShape) -> str:
    size = infer_group_size(shape.in_features, shape.num_groups)
    return f"group size {size}" if size is not None else f"{shape.num_groups} groups"
