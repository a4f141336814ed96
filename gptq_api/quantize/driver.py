"""A model, layer by layer, in true-sequential order (k, v, q | o | up, gate | down): what a module is calibrated on is
what the modules before it make after quantization.

Resident are one layer in float32, the calibration activations, and the Hessian of one stage. Perplexity is measured on
the way: the evaluation texts go through every layer twice, as it was and as it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from gptq_api.checkpoint.checkpoint import Checkpoint, CheckpointError
from gptq_api.checkpoint.packing import (
    ZeroVersion,
    pack_qweight,
    pack_qzeros,
    unpack_qweight,
    unpack_qzeros,
    values_per_unit,
)
from gptq_api.model.config import LlamaConfig
from gptq_api.model.layers.norm import RMSNorm
from gptq_api.model.layers.rotary import Rotary
from gptq_api.model.modules import all_modules, layer_prefix
from gptq_api.model.stored import has_head
from gptq_api.quantize.block import STAGES, Block, Texts
from gptq_api.quantize.gptq import (
    Factor,
    Hessian,
    QuantizedLinear,
    QuantizeError,
    QuantizeOptions,
    factorize,
    quantize,
    round_to_nearest,
)
from gptq_api.quantize.work import ModuleReport, WorkFolder

_HEAD_ROWS = 1024


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized."""

    settings: QuantizeOptions
    zero_version: ZeroVersion = 1
    nearest: bool = False
    """round to nearest instead of GPTQ"""


@dataclass(frozen=True)
class Outcome:
    """Perplexities are None without evaluation texts."""

    perplexity_before: float | None
    perplexity_after: float | None
    reports: list[ModuleReport]


def check_shapes(config: LlamaConfig, bits: int) -> None:
    """CheckpointError where a module does not fill whole words of packed values."""
    unit = values_per_unit(bits)
    for name, module in all_modules(config):
        k, n = module.in_features, module.out_features
        if k % unit or n % unit:
            raise CheckpointError(
                f"{name} has {k} inputs and {n} outputs, and {bits} bits are packed in units of {unit}; use other bits"
            )


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What is not quantized is stored as it was, or as float16 where it was float32."""
    return torch.bfloat16 if checkpoint.float_dtype == torch.bfloat16 else torch.float16


@torch.inference_mode()
def quantize_model(
    checkpoint: Checkpoint,
    config: LlamaConfig,
    recipe: Recipe,
    calibration: list[Texts],
    evaluation: list[Texts],
    work: WorkFolder,
    device: torch.device,
    report: Callable[[ModuleReport], None],
) -> Outcome:
    """Every layer into `work`, or out of it where it is done already. Without calibration texts only `recipe.nearest`
    works. CheckpointError for a tensor that is not as it should be or a Hessian that cannot be factorised."""
    dtype = stored_dtype(checkpoint)
    rotary = Rotary(config.rope, config.head_dim, config.max_position_embeddings, device)
    shape = (config.vocab_size, config.hidden_size)
    embedding = checkpoint.tensor("model.embed_tokens.weight", shape)
    before = [_embed(texts, embedding, device) for texts in evaluation]
    embedding = embedding.to(dtype)
    after = [_embed(texts, embedding, device) for texts in evaluation]
    xs = [_embed(texts, embedding, device) for texts in calibration]
    del embedding
    masks = [texts.is_text.to(device) for texts in calibration]
    reports: list[ModuleReport] = []
    for index in range(config.num_hidden_layers):
        block = Block(checkpoint, config, index, device)
        _advance(before, partial(block.forward, rotary=rotary))
        block.round_rest(dtype)
        prefix = layer_prefix(index)
        done = work.read(index)
        if done is None:
            tensors, layer_reports = _quantize_block(block, prefix, recipe, xs, masks, rotary, report)
            work.write(index, tensors, layer_reports)
        else:
            tensors, layer_reports = done
            for module in block.weights:
                block.weights[module] = _decode(tensors, prefix + module, recipe).to(device)
            _advance(xs, partial(block.forward, rotary=rotary))
            for module_report in layer_reports:
                report(module_report)
        reports += layer_reports
        _advance(after, partial(block.forward, rotary=rotary))
    return Outcome(
        _perplexity(checkpoint, config, evaluation, before, None),
        _perplexity(checkpoint, config, evaluation, after, dtype),
        reports,
    )


def _embed(texts: Texts, embedding: Tensor, device: torch.device) -> Tensor:
    return functional.embedding(texts.ids, embedding).to(device, torch.float32)


def _advance(xs: list[Tensor], step: Callable[[Tensor], Tensor]) -> None:
    """In place and one by one, so that only one batch exists twice."""
    for i, x in enumerate(xs):
        xs[i] = step(x)


def _quantize_block(
    block: Block,
    prefix: str,
    recipe: Recipe,
    xs: list[Tensor],
    masks: list[Tensor],
    rotary: Rotary,
    report: Callable[[ModuleReport], None],
) -> tuple[dict[str, Tensor], list[ModuleReport]]:
    """Quantizes the block's weights in place and moves `xs` through it. -> (tensors to store, reports)."""
    inputs: tuple[Callable[[Tensor], Tensor], ...] = (
        block.attention_input,
        partial(block.attended, rotary=rotary),
        block.mlp_input,
        block.gated,
    )
    tensors: dict[str, Tensor] = {}
    reports: list[ModuleReport] = []
    for joint, stage_input in zip(STAGES, inputs, strict=True):
        modules = block.modules(joint)
        hessian = Hessian(block.weights[modules[0]].shape[1], block.weights[modules[0]].device)
        for x, mask in zip(xs, masks, strict=True):
            hessian.add(stage_input(x)[mask])
        try:
            factor = None if recipe.nearest else factorize(hessian.matrix(), recipe.settings)
        except QuantizeError as error:
            raise CheckpointError(f"{prefix}{modules[0]} cannot be quantized: {error}") from None
        # Rows of a weight do not know each other: q, k and v are quantized as one, in a third of the steps.
        weights = [block.weights[module] for module in modules]
        results = _split(_quantize(torch.cat(weights), factor, recipe), [len(weight) for weight in weights])
        damp = recipe.settings.damp_percent if factor is None else factor.damp_percent
        for module, weight, result in zip(modules, weights, results, strict=True):
            block.weights[module] = result.dequantize().contiguous()
            tensors |= _encode(result, prefix + module, recipe)
            cost = _relative_error(weight, block.weights[module], hessian.matrix()) if xs else None
            reports.append(ModuleReport(prefix + module, cost, damp, int((result.zeros == 0).sum())))
            report(reports[-1])
        if joint == "o":
            _advance(xs, partial(block.after_attention, rotary=rotary))
    _advance(xs, block.after_mlp)
    return tensors, reports


def _quantize(weight: Tensor, factor: Factor | None, recipe: Recipe) -> QuantizedLinear:
    """With the scales that are stored: the layers that follow shall see those."""
    s = recipe.settings
    result = round_to_nearest(weight, s) if factor is None else quantize(weight, factor, s)
    return replace(result, scales=result.scales.half().float())


def _split(result: QuantizedLinear, sizes: list[int]) -> list[QuantizedLinear]:
    """By outputs, which are the last dimension of all but g_idx."""
    parts = zip(*(torch.split_with_sizes(t, sizes, 1) for t in (result.q, result.scales, result.zeros)), strict=True)
    return [QuantizedLinear(q, scales, zeros, result.g_idx, math.nan) for q, scales, zeros in parts]


def _relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    def energy(w: Tensor) -> float:
        return float(((w @ hessian) * w).sum(dtype=torch.float64))

    total = energy(weight)
    return energy(weight - quantized) / total if total > 0 else 0.0


def _encode(result: QuantizedLinear, module: str, recipe: Recipe) -> dict[str, Tensor]:
    bits = recipe.settings.bits
    found = {
        f"{module}.qweight": pack_qweight(result.q, bits),
        f"{module}.qzeros": pack_qzeros(result.zeros, bits, recipe.zero_version),
        f"{module}.scales": result.scales.half(),
        f"{module}.g_idx": result.g_idx.clone(),  # q, k and v have one, and the file wants three
    }
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def _decode(tensors: dict[str, Tensor], module: str, recipe: Recipe) -> Tensor:
    """What `_encode` stored, dequantized: float32 [N, K]."""
    bits = recipe.settings.bits
    return (
        QuantizedLinear(
            q=unpack_qweight(tensors[f"{module}.qweight"], bits),
            scales=tensors[f"{module}.scales"].float(),
            zeros=unpack_qzeros(tensors[f"{module}.qzeros"], bits, recipe.zero_version),
            g_idx=tensors[f"{module}.g_idx"],
            loss=math.nan,
        )
        .dequantize()
        .contiguous()
    )


def _perplexity(
    checkpoint: Checkpoint, config: LlamaConfig, texts: list[Texts], xs: list[Tensor], dtype: torch.dtype | None
) -> float | None:
    """exp of the mean negative log-likelihood of every token but the texts' first. `dtype`: what norm and head are
    rounded to; None: as they are."""
    if not texts:
        return None
    hidden, device = config.hidden_size, xs[0].device

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = checkpoint.tensor(name, shape)
        return (tensor if dtype is None else tensor.to(dtype)).to(device, torch.float32)

    norm = RMSNorm(read("model.norm.weight", (hidden,)), config.rms_norm_eps)
    tied = config.ties_head(has_head(checkpoint))
    head = read("model.embed_tokens.weight" if tied else "lm_head.weight", (config.vocab_size, hidden))
    total, num = 0.0, 0
    for x, batch in zip(xs, texts, strict=True):
        predicted = batch.is_text[:, 1:].to(device)
        rows = norm.forward(x[:, :-1][predicted])
        targets = batch.ids[:, 1:].to(device)[predicted]
        for start in range(0, len(rows), _HEAD_ROWS):
            logits = functional.linear(rows[start : start + _HEAD_ROWS], head)
            total += float(functional.cross_entropy(logits, targets[start : start + _HEAD_ROWS], reduction="sum"))
        num += len(targets)
    return math.exp(min(total / num, 700.0))
