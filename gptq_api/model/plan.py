"""What serving a checkpoint would take, from its headers alone: which kernel takes each kind of module, and the
memory of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gptq_api.checkpoint.checkpoint import Checkpoint, CheckpointError
from gptq_api.checkpoint.module import ModuleShape, infer_group_size
from gptq_api.kernels import cpu
from gptq_api.kernels.layout import CHUNK_K, STRIP_ROWS, chunk_bytes
from gptq_api.layers.linear import choose_kernel
from gptq_api.model.config import LlamaConfig
from gptq_api.model.loader import has_head


@dataclass(frozen=True)
class ServingPlan:
    """Bytes are those of the engine's own tensors, on the device."""

    paths: dict[str, str]
    """kind of module ("q_proj") -> kernel, with the reason where it is a slow one"""
    weight_bytes: int


def plan_serving(checkpoint: Checkpoint, config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> ServingPlan:
    """CheckpointError where a tensor is missing or does not have the shape config.json gives."""
    paths: dict[str, list[str]] = {}
    total = 0
    for name, in_features, out_features in linears(config):
        shape = checkpoint.modules.get(name)
        kind = name.rsplit(".", 1)[-1]
        if shape is None:
            _check_dense(checkpoint, f"{name}.weight", (out_features, in_features))
            path, size = f"dense {str(dtype).removeprefix('torch.')}", in_features * out_features * dtype.itemsize
        else:
            _check_quantized(checkpoint, name, shape, in_features, out_features)
            path, size = _quantized(shape, device, dtype)
        paths.setdefault(kind, [])
        if path not in paths[kind]:
            paths[kind].append(path)
        total += size
    total += _ends(checkpoint, config, device, dtype)
    return ServingPlan({kind: "; ".join(found) for kind, found in paths.items()}, total)


def linears(config: LlamaConfig) -> Iterator[tuple[str, int, int]]:
    """(name, inputs, outputs) of every Linear in the blocks."""
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden, ffn = config.hidden_size, config.intermediate_size
    for index in range(config.num_hidden_layers):
        for part, n in (("q", heads), ("k", kv), ("v", kv)):
            yield f"model.layers.{index}.self_attn.{part}_proj", hidden, n
        yield f"model.layers.{index}.self_attn.o_proj", heads, hidden
        yield f"model.layers.{index}.mlp.gate_proj", hidden, ffn
        yield f"model.layers.{index}.mlp.up_proj", hidden, ffn
        yield f"model.layers.{index}.mlp.down_proj", ffn, hidden


def _quantized(shape: ModuleShape, device: torch.device, dtype: torch.dtype) -> tuple[str, int]:
    k, n = shape.in_features, shape.out_features
    group = infer_group_size(k, shape.num_groups) or k // shape.num_groups
    choice = choose_kernel(shape.bits, k, n, group, device, dtype)
    packed = k * n * shape.bits // 8
    if choice.kernel == "int4":
        return str(choice), packed + k // (cpu.operator_group(k, group) or k) * n * 4
    if choice.kernel == "cuda int4":
        # Zero points counted: the headers do not say whether there are any, and they are a hundredth of the weight.
        return str(choice), -(-k // CHUNK_K) * (n // STRIP_ROWS) * chunk_bytes(group, has_zeros=True) + k * 4
    return str(choice), packed + shape.num_groups * n * 3 + k * 4


def _ends(checkpoint: Checkpoint, config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> int:
    """Embedding and head (float32 on the CPU, once where they are tied)."""
    elements = config.vocab_size * config.hidden_size
    _check_dense(checkpoint, "model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    head_bytes = 4 if device.type == "cpu" else dtype.itemsize
    if config.ties_head(has_head(checkpoint)):
        return elements * head_bytes
    stored = dtype.itemsize if device.type == "cuda" else checkpoint.float_dtype.itemsize
    if "lm_head" in checkpoint.modules:
        return elements * stored + _quantized(checkpoint.modules["lm_head"], device, dtype)[1]
    _check_dense(checkpoint, "lm_head.weight", (config.vocab_size, config.hidden_size))
    return elements * (stored + head_bytes)


def _check_dense(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    if not checkpoint.has(name):
        raise CheckpointError(f"{checkpoint.files[0]}: tensor {name} is missing; download the checkpoint again")
    if checkpoint.store.shape(name) != shape:
        raise CheckpointError(
            f"{checkpoint.store.file(name)}: tensor {name} is {checkpoint.store.shape(name)}, "
            f"config.json gives {shape}; use the config.json of this model"
        )


def _check_quantized(checkpoint: Checkpoint, name: str, shape: ModuleShape, k: int, n: int) -> None:
    if (shape.in_features, shape.out_features) != (k, n):
        raise CheckpointError(
            f"{checkpoint.store.file(f'{name}.qweight')}: tensor {name}.qweight has {shape.in_features} inputs and "
            f"{shape.out_features} outputs, config.json gives {k} and {n}; use the right one"
        )
