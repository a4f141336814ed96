"""A GPTQ checkpoint folder: find it, open it, read its tensors. What it is comes from the tensors; configs and flags
are only cross-checked: a flag that contradicts the tensors is an error, a config that does is a warning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from gptq_api.gptq.errors import CheckpointError
from gptq_api.gptq.files import WeightFiles, candidates
from gptq_api.gptq.module import (
    GPTQTensors,
    ModuleShape,
    infer_group_size,
    is_permuted,
    module_shape,
    read_bias,
    read_module,
    sniff_zero_version,
)
from gptq_api.gptq.packing import ZeroVersion
from gptq_api.gptq.quant_config import QuantConfig, read_quant_config
from gptq_api.gptq.tensors import TensorStore

__all__ = ["Checkpoint", "CheckpointError", "Expected", "GPTQTensors", "open_checkpoint"]

_FOREIGN = {
    ".weight_packed": "a compressed-tensors checkpoint (llm-compressor); use one written by GPTQModel or AutoGPTQ",
    ".q_weight": "an EXL2 checkpoint (exllamav2); use a GPTQ one of the model",
    ".trellis": "an EXL3 checkpoint (exllamav3); use a GPTQ one of the model",
    ".B": "a Marlin-packed checkpoint; use the GPTQ checkpoint it was repacked from",
    ".weight.absmax": "a bitsandbytes checkpoint; use a GPTQ one of the model",
    ".W_q": "an HQQ checkpoint; use a GPTQ one of the model",
    ".weight_scale_inv": "an FP8 checkpoint; use a GPTQ one of the model",
    ".weight_scale": "an FP8 or INT8 checkpoint; use a GPTQ one of the model",
}


@dataclass(frozen=True)
class Expected:
    """What the user's flags claim (--gptq-wbits, --gptq-groupsize, --gptq-act-order); None: no claim."""

    bits: int | None = None
    group_size: int | None = None
    act_order: bool | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `warnings` are sentences for the log."""

    folder: Path
    store: TensorStore
    config: QuantConfig
    modules: dict[str, ModuleShape]
    """every quantised module, by name, from the headers"""
    default_zero_version: ZeroVersion
    warnings: tuple[str, ...]

    @property
    def layout(self) -> str:
        return self.store.weights.layout

    @property
    def files(self) -> tuple[Path, ...]:
        return self.store.weights.files

    def has(self, name: str) -> bool:
        return name in self.store

    def gptq(self, module: str) -> GPTQTensors:
        """The decoded tensors of one quantised module."""
        return read_module(self.store, module, self.default_zero_version)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """An unquantised tensor in memory of its own, finite, of the given shape."""
        if name not in self.store:
            raise CheckpointError(f"{self.files[0]}: tensor {name} is missing; download the checkpoint again")
        if self.store.shape(name) != shape:
            raise CheckpointError(
                f"{self.store.file(name)}: tensor {name} is {self.store.shape(name)}, config.json gives {shape}; "
                "use the config.json of this model"
            )
        dtype = self.store.dtype(name)
        if dtype is None or not dtype.is_floating_point:
            raise CheckpointError(f"{self.store.file(name)}: tensor {name} is {dtype} where a float type is expected")
        tensor = self.store.read(name).clone()
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{self.store.file(name)}: tensor {name} holds NaN or infinity; download the file again"
            )
        return tensor

    def bias(self, module: str) -> Tensor | None:
        """The bias of an unquantised module; None where absent or all zeros."""
        return read_bias(self.store, module)

    @cached_property
    def float_dtype(self) -> torch.dtype:
        """What the unquantised part is stored as (of the scales, where there is nothing else)."""
        for name in ("model.embed_tokens.weight", "model.norm.weight", *(f"{m}.scales" for m in self.modules)):
            dtype = self.store.dtype(name) if name in self.store else None
            if dtype in (torch.float16, torch.bfloat16, torch.float32):
                return dtype
        return torch.float16


def open_checkpoint(path: Path, ckpt: Path | None = None, expected: Expected | None = None) -> Checkpoint:
    """Open the GPTQ weights in a folder (or the file `ckpt` in it). Reads headers, zero points and g_idx, not the
    weights.

    CheckpointError for everything that is not a GPTQ checkpoint, naming what it is.
    """
    sets = candidates(path, ckpt)
    folder = sets[0].folder
    config = read_quant_config(folder)
    store = _choose(sets)
    names = store.names
    modules = {name.removesuffix(".qweight"): None for name in sorted(names) if name.endswith(".qweight")}
    if not modules:
        raise CheckpointError(_what_else(store))
    shapes = {module: module_shape(store, module) for module in modules}
    version, warnings = _zero_version(store, shapes, config)
    warnings += _check_config(store, shapes, config)
    checkpoint = Checkpoint(folder, store, config, shapes, version, tuple(warnings))
    if expected is not None:
        _check_flags(checkpoint, expected)
    return checkpoint


def _choose(sets: list[WeightFiles]) -> TensorStore:
    """The only set, or the only one with quantised tensors; pickles are opened only where there is nothing else."""
    if len(sets) == 1:
        return TensorStore(sets[0])
    safe = [weights for weights in sets if weights.files[0].suffix == ".safetensors"]
    stores = [TensorStore(weights) for weights in (safe or sets)]
    quantised = [store for store in stores if any(name.endswith(".qweight") for name in store.names)]
    if len(quantised) == 1:
        return quantised[0]
    if not quantised and safe and len(safe) < len(sets):
        return _choose([weights for weights in sets if weights not in safe])
    if not quantised:
        raise CheckpointError(_what_else(stores[0]))
    listed = ", ".join(store.weights.files[0].name for store in quantised)
    raise CheckpointError(f"{sets[0].folder} holds several checkpoints ({listed}); name one with --gptq-ckpt")


def _what_else(store: TensorStore) -> str:
    file = store.weights.files[0]
    names = store.names
    for suffix, what in _FOREIGN.items():
        for name in sorted(names):
            if name.endswith(suffix):
                return f"{file}: tensor {name} belongs to {what}"
    if any(name.endswith(".weight") for name in names):
        return f"{file} holds no quantised tensors (an FP16/BF16 model?); use a GPTQ checkpoint of the model"
    return f"{file} holds no GPTQ tensors (*.qweight); use a GPTQ checkpoint of the model"


def _zero_version(
    store: TensorStore, shapes: dict[str, ModuleShape], config: QuantConfig
) -> tuple[ZeroVersion, list[str]]:
    """The version for modules that do not show their own, and a warning where the tensors contradict the config."""
    shown = {
        version
        for module, shape in shapes.items()
        if (version := sniff_zero_version(store.read(f"{module}.qzeros"), shape.bits)) is not None
    }
    warnings = []
    claimed = config.zero_version or (1 if config.source else None)
    if shown and claimed is not None and shown != {claimed}:
        warnings.append(
            f"{config.source} says zero points are v{claimed} but the tensors show v{min(shown - {claimed})}; "
            "the tensors decide"
        )
    if config.zero_version is None and len(shown) == 1:
        return next(iter(shown)), warnings
    return config.zero_version or 1, warnings


def _check_config(store: TensorStore, shapes: dict[str, ModuleShape], config: QuantConfig) -> list[str]:
    if config.source is None:
        return []
    warnings = []
    for module, shape in shapes.items():
        if config.bits is not None and not config.mixed and shape.bits != config.bits:
            warnings.append(
                f"{config.source} says {config.bits} bits but {module} has {shape.bits}; the tensors decide"
            )
            break
    for module, shape in shapes.items():
        size = config.group_size
        if size is not None and not config.mixed and not _fits(shape, size):
            warnings.append(
                f"{config.source} says group size {size} but {module} has {_describe_group(shape)}; the tensors decide"
            )
            break
    if config.desc_act is False and any(is_permuted(store, module, shape) for module, shape in shapes.items()):
        warnings.append(f"{config.source} says desc_act is false but g_idx is permuted; the tensors decide")
    return warnings


def _check_flags(checkpoint: Checkpoint, expected: Expected) -> None:
    file = checkpoint.files[0]
    for module, shape in checkpoint.modules.items():
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
    permuted = [m for m, shape in checkpoint.modules.items() if is_permuted(checkpoint.store, m, shape)]
    if expected.act_order and not permuted:
        # Act-order with one group or static groups leaves no trace in g_idx, and a writer's config may still say so.
        if checkpoint.config.desc_act is True or all(s.num_groups == 1 for s in checkpoint.modules.values()):
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
