"""A GPTQ checkpoint folder: find it, open it, read its tensors. What it is comes from the tensors; configs and flags
are only cross-checked: a flag that contradicts the tensors is an error, a config that does is a warning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from gptq_api.checkpoint.crosscheck import Expected, check_flags, contradictions, look_at_zeros
from gptq_api.checkpoint.device_reader import DeviceReader
from gptq_api.checkpoint.errors import CheckpointError
from gptq_api.checkpoint.files import WeightFiles, candidates
from gptq_api.checkpoint.foreign import foreign_checkpoint
from gptq_api.checkpoint.module import GPTQTensors, ModuleShape, Outputs, module_shape, read_bias, read_module
from gptq_api.checkpoint.packing import ZeroVersion
from gptq_api.checkpoint.parts import TensorPart
from gptq_api.checkpoint.quant_config import QuantConfig, read_quant_config
from gptq_api.checkpoint.tensors import TensorStore

__all__ = ["Checkpoint", "CheckpointError", "Expected", "GPTQTensors", "open_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `warnings` are sentences for the log."""

    folder: Path
    store: TensorStore
    config: QuantConfig
    modules: dict[str, ModuleShape]
    """every quantized module, by name, from the headers"""
    zero_version: ZeroVersion
    """of all modules"""
    warnings: tuple[str, ...]

    @property
    def layout(self) -> str:
        return self.store.weights.layout

    @property
    def files(self) -> tuple[Path, ...]:
        return self.store.weights.files

    @contextmanager
    def read_on(self, device: torch.device) -> Iterator[Checkpoint]:
        """This checkpoint with its tensors read straight to `device`, as long as the block lasts."""
        with DeviceReader(device) as reader:
            yield self.on(reader)

    def on(self, reader: DeviceReader) -> Checkpoint:
        """The same checkpoint, its tensors read to the reader's device and checked there."""
        return replace(self, store=self.store.on(reader))

    def has(self, name: str) -> bool:
        return name in self.store

    def gptq(self, module: str, outputs: Outputs | None = None) -> GPTQTensors:
        """The decoded tensors of one quantized module, or of some of its outputs."""
        return read_module(self.store, module, self.modules[module], self.zero_version, outputs)

    def tensor(self, name: str, shape: tuple[int, ...], rows: Outputs | None = None) -> Tensor:
        """An unquantized tensor in memory of its own, finite, of the given shape. `rows`: of these alone."""
        self.check(name, shape)
        tensor = self.store.own(name, None if rows is None else TensorPart(0, rows))
        if not _is_finite(tensor):
            raise CheckpointError(
                f"{self.store.file(name)}: tensor {name} holds NaN or infinity; download the file again"
            )
        return tensor

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """CheckpointError where the header has no such unquantized tensor."""
        if name not in self.store:
            raise CheckpointError(f"{self.files[0]}: tensor {name} is missing; download the checkpoint again")
        if self.store.shape(name) != shape:
            raise CheckpointError(
                f"{self.store.file(name)}: tensor {name} is {self.store.shape(name)}, config.json gives {shape}; "
                "use the config.json of this model"
            )
        if not self.store.is_float(name):
            raise CheckpointError(
                f"{self.store.file(name)}: tensor {name} is {self.store.dtype_name(name)} where a float type is "
                "expected; use a GPTQ checkpoint whose other tensors are float16, bfloat16 or float32"
            )

    def bias(self, module: str) -> Tensor | None:
        """The bias of an unquantized module; None where absent or all zeros."""
        return read_bias(self.store, module)

    @cached_property
    def float_dtype(self) -> torch.dtype:
        """What the unquantized part is stored as (of the scales, where there is nothing else)."""
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
    # What a config calls AWQ is told as that, not as tensors that do not fit.
    config = read_quant_config(folder)
    store = _choose(_named_by(config, sets))
    names = sorted(name.removesuffix(".qweight") for name in store.names if name.endswith(".qweight"))
    if not names:
        raise CheckpointError(foreign_checkpoint(store))
    shapes = {module: module_shape(store, module) for module in names}
    if config.source is None:
        config = read_quant_config(folder, store)
    zeros = look_at_zeros(store, shapes, config)
    warnings = [*zeros.warnings, *contradictions(store, shapes, config, zeros)]
    if expected is not None:
        check_flags(store, shapes, config, expected)
    return Checkpoint(folder, store, config, shapes, zeros.version, tuple(warnings))


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    # isfinite makes tensors as large as the one looked at. A NaN survives both minimum and maximum.
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _named_by(config: QuantConfig, sets: list[WeightFiles]) -> list[WeightFiles]:
    """The sets that the config's `model_file_base_name` means; all where it means none, as after a file was renamed."""
    return [weights for weights in sets if config.weights_name in (weights.name, weights.files[0].stem)] or sets


def _choose(sets: list[WeightFiles]) -> TensorStore:
    """The only set, or the only one with quantized tensors; pickles are opened only where there is nothing else."""
    if len(sets) == 1:
        return TensorStore(sets[0])
    safe = [weights for weights in sets if weights.files[0].suffix == ".safetensors"]
    stores = [TensorStore(weights) for weights in (safe or sets)]
    quantized = [store for store in stores if any(name.endswith(".qweight") for name in store.names)]
    if len(quantized) == 1:
        return quantized[0]
    if not quantized and safe and len(safe) < len(sets):
        return _choose([weights for weights in sets if weights not in safe])
    if not quantized:
        raise CheckpointError(foreign_checkpoint(stores[0]))
    listed = ", ".join(store.weights.files[0].name for store in quantized)
    raise CheckpointError(f"{sets[0].folder} holds several checkpoints ({listed}); name one with --gptq-ckpt")
