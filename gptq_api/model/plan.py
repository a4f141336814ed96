"""What serving a checkpoint would take, from its headers alone: which kernel takes each kind of module, and the
memory of the weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from gptq_api.checkpoint.checkpoint import Checkpoint
from gptq_api.checkpoint.module import ModuleShape, group_size_of
from gptq_api.model.backend import Backend, KernelChoice
from gptq_api.model.config import LlamaConfig
from gptq_api.model.modules import all_modules, norm_shapes
from gptq_api.model.shard import WHOLE, Shard, outputs
from gptq_api.model.stored import (
    check_bias,
    check_head,
    check_layers,
    check_module,
    has_head,
    head_notes,
    slow_notes,
    unused_notes,
)


@dataclass(frozen=True)
class ServingPlan:
    """Bytes are those of the engine's own tensors, on the device."""

    kernels: dict[str, str]
    """kind of module ("q_proj") -> kernel, with the reason where it is a slow one"""
    weight_bytes: int
    warnings: list[str]
    """what loading will warn about, as far as headers tell"""


def plan_serving(checkpoint: Checkpoint, config: LlamaConfig, backend: Backend, shard: Shard = WHOLE) -> ServingPlan:
    """CheckpointError where a tensor is missing or does not have the shape config.json gives. `shard`: what one rank
    takes."""
    kernels: dict[str, list[str]] = {}
    slow: dict[str, Counter[str]] = {}
    total = 0
    for name, module in all_modules(config):
        shape = checkpoint.modules.get(name)
        kind = name.rsplit(".", 1)[-1]
        k, n = module.in_features, sum(map(len, outputs(config, module, shard)))
        if shape is None:
            checkpoint.check(f"{name}.weight", (module.out_features, k))
            dtype = backend.dtype
            choice = KernelChoice(f"dense {str(dtype).removeprefix('torch.')}", k * n * dtype.itemsize)
        else:
            check_module(checkpoint, name, module)
            choice = _choice(shape, n, backend)
        if choice.reason is not None:
            slow.setdefault(choice.reason, Counter()).update([kind])
        found = kernels.setdefault(kind, [])
        if str(choice) not in found:
            found.append(str(choice))
        total += choice.num_bytes
        check_bias(checkpoint, config, name, module)
    for name, norm in norm_shapes(config).items():
        checkpoint.check(name, norm)
    total += _ends(checkpoint, config, backend, kernels, shard)
    check_layers(checkpoint, config)
    warnings = head_notes(checkpoint, config) + unused_notes(checkpoint, config) + slow_notes(slow)
    return ServingPlan({kind: "; ".join(found) for kind, found in kernels.items()}, total, warnings)


def _choice(shape: ModuleShape, num_outputs: int, backend: Backend) -> KernelChoice:
    return backend.kernel(shape.bits, shape.in_features, num_outputs, group_size_of(shape))


def _ends(
    checkpoint: Checkpoint, config: LlamaConfig, backend: Backend, kernels: dict[str, list[str]], shard: Shard
) -> int:
    """Bytes of embedding and head, once where they share memory; a quantized head becomes one of the `kernels`."""
    elements = config.vocab_size * config.hidden_size
    checkpoint.check("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    check_head(checkpoint, config)
    tied = config.ties_head(has_head(checkpoint))
    embedding = elements * backend.embedding_dtype(checkpoint.float_dtype, tied).itemsize
    if not tied and "lm_head" in checkpoint.modules:
        choice = _choice(checkpoint.modules["lm_head"], len(shard.of(config.vocab_size)), backend)
        kernels["lm_head"] = [str(choice)]
        return embedding + choice.num_bytes
    if not tied:
        checkpoint.check("lm_head.weight", (config.vocab_size, config.hidden_size))
    choice = backend.head_kernel(len(shard.of(config.vocab_size)), config.hidden_size, tied=tied)
    if not choice.kind.startswith("dense"):
        kernels["lm_head"] = [str(choice)]
    return embedding + choice.num_bytes
