"""Unquantized models through the same door as GPTQ checkpoints: a folder of FP16 weights, to quantize or to measure
against, and the weights of a GPTQ checkpoint as they are after dequantization."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gptq_api.checkpoint.checkpoint import Checkpoint, CheckpointError
from gptq_api.checkpoint.device_reader import DeviceReader
from gptq_api.checkpoint.files import WeightFiles, candidates, read_json
from gptq_api.checkpoint.module import Outputs
from gptq_api.checkpoint.packing import unpack_qweight
from gptq_api.checkpoint.quant_config import QuantConfig
from gptq_api.checkpoint.tensors import TensorStore
from gptq_api.on_disk import is_there

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def open_dense(folder: Path, ckpt: Path | None = None) -> Checkpoint:
    """A model folder in float16, bfloat16 or float32 (or the weights file `ckpt` in it), as a Checkpoint without
    quantized modules.

    CheckpointError for what is not a model folder, and for one that is quantized already.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; name the folder of an FP16, BF16 or FP32 model")
    if not is_there(folder / "config.json"):
        raise CheckpointError(f"{folder} has no config.json; is it the folder of a model?")
    quantized = read_json(folder / "config.json").get("quantization_config")
    if quantized is not None or is_there(folder / "quantize_config.json"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise CheckpointError(
            f"{folder} is quantized already ({method or 'quantize_config.json'}); use the FP16 model it was made of"
        )
    store = TensorStore(_weights(folder, ckpt))
    for name in sorted(store.names):
        if name.endswith(".qweight"):
            raise CheckpointError(f"{store.file(name)} is quantized already; use the FP16 model it was made of")
        if name.endswith(".weight") and store.dtype(name) not in _FLOATS:
            raise CheckpointError(
                f"{store.file(name)}: tensor {name} is {store.dtype(name)}, not float16, bfloat16 or float32; "
                "use the unquantized model"
            )
    return Checkpoint(folder, store, QuantConfig(), {}, 1, ())


def _weights(folder: Path, ckpt: Path | None) -> WeightFiles:
    """The safetensors where there are both; Mistral's own copy (consolidated) beside them does not count."""
    if ckpt is not None:
        return candidates(folder, ckpt)[0]
    sets = [weights for weights in candidates(folder) if not weights.files[0].name.startswith("consolidated")]
    safe = [weights for weights in sets if weights.files[0].suffix == ".safetensors"] or sets
    if len(safe) != 1:
        listed = ", ".join(weights.files[0].name for weights in safe) or "only consolidated weights"
        raise CheckpointError(f"{folder} holds several sets of weights ({listed}); name one with --gptq-ckpt")
    return safe[0]


@dataclass(frozen=True)
class DequantizedCheckpoint(Checkpoint):
    """A GPTQ checkpoint that says it is not one: its modules have a dense float32 `weight`."""

    source: Checkpoint

    def on(self, reader: DeviceReader) -> DequantizedCheckpoint:
        source = self.source.on(reader)
        return replace(self, store=source.store, source=source)

    def has(self, name: str) -> bool:
        return name in self.store or name.removesuffix(".weight") in self.source.modules

    def tensor(self, name: str, shape: tuple[int, ...], rows: Outputs | None = None) -> Tensor:
        module = name.removesuffix(".weight")
        if module == name or module not in self.source.modules:
            return self.source.tensor(name, shape, rows)
        stored = self.source.modules[module]
        if (stored.out_features, stored.in_features) != shape:
            raise CheckpointError(
                f"{self.store.file(f'{module}.qweight')}: {module} is {(stored.out_features, stored.in_features)}, "
                f"config.json gives {shape}; use the config.json of this model"
            )
        t = self.source.gptq(module, rows)
        groups = t.g_idx.long()
        centred = unpack_qweight(t.qweight, t.bits).float() - t.zeros.float()[groups]
        return centred.mul_(t.scales.float()[groups]).t().contiguous()


def dequantized(checkpoint: Checkpoint) -> DequantizedCheckpoint:
    c = checkpoint
    return DequantizedCheckpoint(c.folder, c.store, c.config, {}, c.zero_version, c.warnings, c)
