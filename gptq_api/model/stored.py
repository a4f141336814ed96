"""What a checkpoint stores, held against the table of modules, from headers alone: loading and `inspect` refuse and
warn in the same sentences."""

from __future__ import annotations

import re
from collections import Counter

from gptq_api.checkpoint.checkpoint import Checkpoint, CheckpointError
from gptq_api.model.config import LlamaConfig
from gptq_api.model.modules import Module, all_modules, norm_shapes

IGNORED = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "gptq_bits",
    "gptq_groupsize",
    "gptq_sym",
)
"""Tensors of older writers that nothing needs: rotary frequencies are computed anew in float32."""
LAYER = re.compile(r"^model\.layers\.(\d{1,9})\.")
_PARTS = ("qweight", "qzeros", "zeros", "scales", "g_idx", "bias", "weight")


def has_head(checkpoint: Checkpoint) -> bool:
    """Whether the file has an output head of its own, quantized or not."""
    return checkpoint.has("lm_head.weight") or "lm_head" in checkpoint.modules


def check_module(checkpoint: Checkpoint, name: str, module: Module) -> None:
    """CheckpointError where a quantized module is not as large as config.json says."""
    shape = checkpoint.modules[name]
    if (shape.in_features, shape.out_features) != (module.in_features, module.out_features):
        raise CheckpointError(
            f"{checkpoint.store.file(f'{name}.qweight')}: tensor {name}.qweight has {shape.in_features} inputs and "
            f"{shape.out_features} outputs, config.json gives {module.in_features} and {module.out_features}; use the "
            "config.json of this model"
        )


def check_bias(checkpoint: Checkpoint, config: LlamaConfig, name: str, module: Module) -> None:
    """CheckpointError where a bias is missing that the family has."""
    if module.has_bias and not checkpoint.has(f"{name}.bias"):
        raise CheckpointError(
            f"{checkpoint.files[0]}: tensor {name}.bias is missing, and {config.family.title} with this "
            "config.json has it; download the checkpoint again"
        )


def check_head(checkpoint: Checkpoint, config: LlamaConfig) -> None:
    """CheckpointError where there is no head and the embedding may not be it."""
    if config.tie_word_embeddings is False and not has_head(checkpoint):
        raise CheckpointError(
            f"{checkpoint.files[0]}: tensor lm_head.weight is missing and config.json says that "
            "tie_word_embeddings is false; download the checkpoint again, or set it if the model ties them"
        )


def check_layers(checkpoint: Checkpoint, config: LlamaConfig) -> None:
    """CheckpointError for layers and norms that config.json knows nothing of."""
    norms = norm_shapes(config)
    for name in sorted(checkpoint.store.names):
        layer = LAYER.match(name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            raise CheckpointError(
                f"{checkpoint.store.file(name)}: tensor {name} is beyond the {config.num_hidden_layers} "
                "layers that config.json gives; use the config.json of this model"
            )
        if layer and name.endswith("norm.weight") and name not in norms:
            raise CheckpointError(
                f"{checkpoint.store.file(name)}: tensor {name} is unknown to {config.family.title}, "
                "which config.json says it is; use the config.json of this model"
            )


def head_notes(checkpoint: Checkpoint, config: LlamaConfig) -> list[str]:
    """Warnings about a head that is not the file's own."""
    notes = []
    if not has_head(checkpoint) and config.tie_word_embeddings is None:
        notes.append(
            "the embedding serves as the head: there is no lm_head.weight, and config.json does not say "
            "tie_word_embeddings"
        )
    if "lm_head" in checkpoint.modules and config.ties_head(True):
        notes.append("the quantized lm_head is not used: config.json ties the embedding to the head")
    return notes


def unused_notes(checkpoint: Checkpoint, config: LlamaConfig) -> list[str]:
    """A warning about tensors that nothing needs."""
    modules = ["lm_head", *(name for name, _ in all_modules(config))]
    used = {
        "model.embed_tokens.weight",
        *norm_shapes(config),
        *(f"{name}.{part}" for name in modules for part in _PARTS),
    }
    unused = sorted(name for name in checkpoint.store.names - used if not name.endswith(IGNORED))
    more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
    return [f"tensor {unused[0]}{more} of the checkpoint is not used"] if unused else []


def slow_notes(slow: dict[str, Counter[str]]) -> list[str]:
    """Warnings; `slow`: why -> kinds of modules ("down_proj") that take the slow path for that reason."""
    return [f"{', '.join(kinds)} ({kinds.total()} modules) take the slow path: {why}" for why, kinds in slow.items()]
