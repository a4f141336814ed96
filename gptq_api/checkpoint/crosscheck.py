"""What configs and flags claim, held against the tensors: a config that is wrong is a warning, a flag is an error."""

from __future__ import annotations

from dataclasses import dataclass

from gptq_api.checkpoint.claims import ClaimTable
from gptq_api.checkpoint.errors import CheckpointError
from gptq_api.checkpoint.module import ModuleShape, infer_group_size, is_permuted
from gptq_api.checkpoint.packing import ZeroVersion
from gptq_api.checkpoint.quant_config import QuantConfig
from gptq_api.checkpoint.tensors import TensorStore
from gptq_api.checkpoint.zeros import Evidence, sniff_zero_version


@dataclass(frozen=True)
class Expected:
    """What the user's flags claim (--gptq-wbits, --gptq-groupsize, --gptq-act-order); None: no claim."""

    bits: int | None = None
    group_size: int | None = None
    act_order: bool | None = None


@dataclass(frozen=True)
class Zeros:
    """What the zero points of all modules together say."""

    version: ZeroVersion
    """one for the checkpoint: no writer mixes them"""
    sym: frozenset[str]
    """the modules whose zero points are all in the middle"""
    warnings: tuple[str, ...]


def look_at_zeros(store: TensorStore, shapes: dict[str, ModuleShape], config: QuantConfig) -> Zeros:
    """The zero version, and warnings where the tensors contradict the config or look like neither version.

    Zero points that are all alike, in every module, show it whatever a config says. Else the config knows, and where it
    says nothing all modules are asked together: one module alone shows nothing, its zero points may all be 7 by chance.
    """
    evidence = Evidence()
    alike: dict[str, ZeroVersion] = {}
    for module, shape in shapes.items():
        if not shape.float_zeros:
            words = store.read(f"{module}.qzeros")
            version = sniff_zero_version(words, shape.bits)
            evidence.add(words, shape.bits, version)
            if version is not None:
                alike[module] = version
    unanimous = evidence.unanimous
    claimed: ZeroVersion | None = config.zero_version or (1 if config.source else None)
    decided: ZeroVersion = unanimous or config.zero_version or evidence.likelier
    warnings = []
    if claimed is not None and decided != claimed:
        said = f"{config.source} says" if config.zero_version else f"{config.source} says nothing, which means"
        warnings.append(f"{said} zero points are v{claimed} but the tensors show v{decided}; the tensors decide")
    if claimed is None and unanimous is None and decided == 2:
        warnings.append("no config says so, but by all zero points together they are v2, as which they are read")
    sym = frozenset(module for module, version in alike.items() if version == decided)
    if config.zero_version is not None and len(sym) < len(alike):
        others = [module for module in alike if module not in sym]
        those = others[0] if len(others) == 1 else f"{others[0]} and {len(others) - 1} more"
        warnings.append(
            f"{config.source} says zero points are v{decided}, and those of {those} look like v{3 - decided}; the "
            "config decides"
        )
    warnings += evidence.complaints(decided)
    return Zeros(decided, sym, tuple(warnings))


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
        if claim.sym is True and module not in zeros.sym and not shape.float_zeros:
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
