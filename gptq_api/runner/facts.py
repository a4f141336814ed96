"""What a model that was loaded is, for those who ask the server."""

from __future__ import annotations

import math
from collections import Counter

from gptq_api.checkpoint.checkpoint import Checkpoint
from gptq_api.checkpoint.module import read_groups
from gptq_api.model.config import LlamaConfig
from gptq_api.model.loader import LoadReport
from gptq_api.model.modules import all_modules, layer_prefix, norm_shapes
from gptq_api.model.stored import has_head
from gptq_api.runner.loaded import LoadedRunner
from gptq_api.types import ModelFacts


def model_facts(checkpoint: Checkpoint, config: LlamaConfig, report: LoadReport, runner: LoadedRunner) -> ModelFacts:
    """From headers, and of the tensors the first layer's g_idx alone: who starts with packed weights does not read the
    checkpoint. CheckpointError for a g_idx that is none."""
    modules = checkpoint.modules
    first = [name for name in modules if name.startswith(layer_prefix(0))]
    act_order = any(read_groups(checkpoint.store, name, modules[name])[2] for name in first)
    sizes = Counter(str(-1 if m.num_groups == 1 else -(-m.in_features // m.num_groups)) for m in modules.values())
    return ModelFacts(
        architecture=config.family.title,
        layout=checkpoint.layout,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        parameters=_parameters(config, tied=config.ties_head(has_head(checkpoint))),
        bits=dict(Counter(str(module.bits) for module in modules.values())),
        group_sizes=dict(sizes),
        act_order=act_order,
        kernels=report.kernels,
        linears=report.linears,
        weight_bytes=runner.weight_bytes,
        kv_bytes_per_token=runner.cache_bytes // (runner.num_blocks * runner.block_size),
    )


def _parameters(config: LlamaConfig, *, tied: bool) -> int:
    """Without biases."""
    linears = sum(module.in_features * module.out_features for _, module in all_modules(config))
    norms = sum(math.prod(shape) for shape in norm_shapes(config).values())
    return linears + norms + config.vocab_size * config.hidden_size * (1 if tied else 2)
