"""`gptq-api inspect`: what a checkpoint is and what serving it would take. Reads headers and small tensors, not the
weights."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_api import exits
from gptq_api.cli.output import fail
from gptq_api.config import InspectSettings
from gptq_api.errors import UserError
from gptq_api.text.chat import TemplateFacts
from gptq_api.text.tokens import Tokens

if TYPE_CHECKING:
    import torch

    from gptq_api.checkpoint.checkpoint import Checkpoint
    from gptq_api.model.config import LlamaConfig
    from gptq_api.model.shard import Shard
    from gptq_api.runner.load import Draft
    from gptq_api.runner.options import LoadOptions


def run(settings: InspectSettings) -> int:
    """Print the facts. Exit status: 0 a checkpoint we serve, 1 not one (a sentence on stderr says why, behind the facts
    where only its text is what cannot be served)."""
    try:
        facts = inspect(settings)
    except UserError as error:
        fail("inspect", error)
        return exits.FAILED
    if settings.json_output:
        print(json.dumps(facts, indent=2))
    else:
        print(_as_text(facts))
    if facts["refused"] is not None:
        sys.stdout.flush()
        fail("inspect", facts["refused"])
        return exits.FAILED
    return exits.DONE


def inspect(settings: InspectSettings) -> dict[str, Any]:
    """The facts as JSON values; sizes are in bytes. Raises CheckpointError or ConfigError."""
    from gptq_api.checkpoint.summary import summarise
    from gptq_api.engine.draft_vocabulary import check_vocabulary
    from gptq_api.model.modules import config_of
    from gptq_api.model.plan import plan_serving
    from gptq_api.model.shard import Shard
    from gptq_api.model.stored import has_head
    from gptq_api.runner.backends import choose_backend, resolve_device
    from gptq_api.runner.load import Draft, open_model
    from gptq_api.runner.memory import bytes_of_block, longest_text, plan_cache
    from gptq_api.runner.options import LoadOptions
    from gptq_api.runner.parallel import rank_devices

    options = LoadOptions.of(settings)
    device, checkpoint = resolve_device(options.device), open_model(options)
    config = config_of(checkpoint)
    size = options.tensor_parallel_size
    devices = rank_devices(options, config, device) if size > 1 else [device]
    backend = choose_backend(options, checkpoint, config, device)
    plan = plan_serving(checkpoint, config, backend)
    summary = summarise(checkpoint)
    longest, draft, beside = longest_text(options, config), None, 0
    if options.draft_model is not None:
        check_vocabulary(options)
        draft = Draft.opened(options, config, backend, longest)
        beside = draft.token_bytes
    ranks = [
        _rank(options, checkpoint, config, at, Shard(rank, size), draft if rank == 0 else None)
        for rank, at in enumerate(devices)
    ]
    memory = ranks[0]["kv_cache_memory"]
    if size > 1:
        blocks = backend.blocks_of_ranks([(rank["kv_cache_memory"], rank["block_bytes"]) for rank in ranks])
        memory = blocks * bytes_of_block(options, config, backend, beside)
    token_bytes = config.kv_elements_per_token * backend.cache_dtype(options.kv_cache_dtype).itemsize
    block_bytes = token_bytes * settings.block_size
    cache = plan_cache(options, config, backend, longest, memory, beside)
    packed = backend.packed_file(checkpoint)
    template, refused, without_rows = _text(checkpoint.folder, config.vocab_size)
    return {
        "path": str(checkpoint.folder),
        "layout": checkpoint.layout,
        "files": [file.name for file in checkpoint.files],
        "architecture": {
            "name": config.family.title,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "rope": config.rope.rope_type,
            "tied": config.ties_head(has_head(checkpoint)),
            "max_position_embeddings": config.max_position_embeddings,
            "sliding_window": [{"window": w, "layers": n} for w, n in Counter(config.windows).items()],
            "eos_token_ids": config.eos_token_ids,
        },
        "quantization": {
            "modules": summary.num_modules,
            "bits": summary.bits,
            "group_size": summary.group_sizes,
            "act_order_modules": summary.num_act_order,
            "sym_modules": summary.num_sym,
            "zero_version": summary.zero_versions,
            "zero_points": summary.zero_points,
            "scales_finite_modules": summary.num_scales_read,
            "config": checkpoint.config.source,
        },
        "device": str(device),
        "dtype": str(backend.dtype).removeprefix("torch."),
        "paths": plan.kernels,
        "weight_bytes": sum(rank["weight_bytes"] for rank in ranks),
        "ranks": [] if size == 1 else [{key: rank[key] for key in ("device", "weight_bytes")} for rank in ranks],
        "packed_file": None if packed is None else {"path": str(packed[0]), "is_kept": packed[1]},
        "kv_bytes_per_token": token_bytes,
        "kv_cache_bytes": cache.num_blocks * block_bytes,
        "kv_cache_tokens": cache.num_blocks * settings.block_size,
        "max_model_len": cache.max_model_len,
        "draft_model": None if draft is None else _draft(draft, str(devices[0])),
        "chat_template": template,
        "warnings": [*checkpoint.warnings, *plan.warnings, *cache.notes, *without_rows],
        "refused": refused,
    }


def _rank(
    options: LoadOptions,
    checkpoint: Checkpoint,
    config: LlamaConfig,
    device: torch.device,
    shard: Shard,
    draft: Draft | None,
) -> dict[str, Any]:
    """What one of several devices has of the model, all of it where there is one. `draft`: what is there as well."""
    from gptq_api.model.plan import plan_serving
    from gptq_api.runner.backends import choose_backend
    from gptq_api.runner.memory import bytes_of_block

    backend = choose_backend(options, checkpoint, config, device)
    weight_bytes = plan_serving(checkpoint, config, backend, shard).weight_bytes
    memory = backend.cache_memory(options, weight_bytes + (0 if draft is None else draft.weight_bytes))
    of_block = bytes_of_block(options, shard.config(config), backend, 0 if draft is None else draft.token_bytes)
    return {
        "device": str(device),
        "weight_bytes": weight_bytes,
        "kv_cache_memory": memory,
        "block_bytes": of_block,
    }


def _draft(draft: Draft, device: str) -> dict[str, Any]:
    config, checkpoint = draft.model.config, draft.model.checkpoint
    return {
        "path": str(checkpoint.folder),
        "name": draft.model.title,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "bits": sorted({module.bits for module in checkpoint.modules.values()}),
        "device": device,
        "weight_bytes": draft.weight_bytes,
        "kv_bytes_per_token": draft.token_bytes,
        "max_model_len": draft.model.max_model_len,
    }


def _text(folder: Path, vocab_size: int) -> tuple[str | None, str | None, list[str]]:
    """(where the chat template is from, why the text cannot be served, warnings)."""
    from gptq_api.text.process import TextProcess

    async def started() -> tuple[Tokens, TemplateFacts]:
        text = TextProcess(folder)
        try:
            return await text.start()
        finally:
            text.close()

    try:
        tokens, template = asyncio.run(started())
    except UserError as error:
        return None, str(error), []
    warning = tokens.without_rows(vocab_size)
    return template.source, None, [warning] if warning else []


def _as_text(facts: dict[str, Any]) -> str:
    arch, quant = facts["architecture"], facts["quantization"]
    num_modules = quant["modules"]
    lengths = facts["kv_cache_tokens"] / facts["max_model_len"]
    rows = [
        ("checkpoint", facts["path"]),
        ("layout", f"{facts['layout']}: {', '.join(facts['files'])}"),
        (
            "architecture",
            f"{arch['name']}, {arch['layers']} layers, hidden {arch['hidden_size']}, {arch['heads']} heads "
            f"({arch['kv_heads']} KV, {arch['head_dim']} wide), FFN {arch['intermediate_size']}, "
            f"vocabulary {arch['vocab_size']}{', tied' if arch['tied'] else ''}",
        ),
        ("positions", f"{arch['max_position_embeddings']} (rope {arch['rope']}){_windows(arch['sliding_window'])}"),
        ("bits", _counts(quant["bits"])),
        ("group size", _counts(quant["group_size"])),
        ("act-order", _share(quant["act_order_modules"], num_modules)),
        ("symmetric", _share(quant["sym_modules"], num_modules)),
        ("zero points", _counts(quant["zero_version"])),
        *((f"  {bits} bits", _shares(found)) for bits, found in quant["zero_points"].items()),
        ("quant config", quant["config"] or "none (everything is read from the tensors)"),
        (
            "self-check",
            f"scales finite in {quant['scales_finite_modules']} of {num_modules} modules, every g_idx fits its groups",
        ),
        ("runs on", f"{facts['device']}, {facts['dtype']}"),
        *((f"  {kind}", kernel) for kind, kernel in facts["paths"].items()),
        ("weights", f"{facts['weight_bytes'] / 2**20:.1f} MiB"),
        *(
            (
                f"  rank {i}",
                f"{rank['device']}: {rank['weight_bytes'] / 2**20:.1f} MiB, 1/{len(facts['ranks'])} of the KV cache",
            )
            for i, rank in enumerate(facts["ranks"])
        ),
        *(("  packed", text) for text in _packed(facts["packed_file"])),
        ("KV cache", f"{facts['kv_bytes_per_token']} bytes per token"),
        (
            "  fits",
            f"{facts['kv_cache_tokens']} tokens in {facts['kv_cache_bytes'] / 2**20:.0f} MiB: "
            f"{lengths:.1f} sequences of {facts['max_model_len']}",
        ),
        *(("draft model", text) for text in _drafts(facts["draft_model"], len(facts["ranks"]))),
        ("text", facts["chat_template"] or "cannot be served"),
        *(("warning", warning) for warning in facts["warnings"]),
    ]
    return "\n".join(f"{name:<14}{value}" for name, value in rows)


def _drafts(draft: dict[str, Any] | None, num_ranks: int) -> list[str]:
    if draft is None:
        return []
    where = f" beside rank 0, on {draft['device']}" if num_ranks else ""
    bits = f"{'/'.join(map(str, draft['bits']))} bits" if draft["bits"] else "unquantized"
    return [
        f"{draft['path']}: {draft['name']}, {draft['layers']} layers, hidden {draft['hidden_size']}, {bits}, up to "
        f"{draft['max_model_len']} tokens; weights {draft['weight_bytes'] / 2**20:.1f} MiB, KV cache "
        f"{draft['kv_bytes_per_token']} bytes per token{where}"
    ]


def _packed(file: dict[str, Any] | None) -> list[str]:
    if file is None:
        return []
    return [f"kept in {file['path']}" if file["is_kept"] else f"will be kept in {file['path']}"]


def _counts(found: dict[Any, int]) -> str:
    if len(found) == 1:
        return str(next(iter(found)))
    return ", ".join(f"{value} ({count} modules)" for value, count in sorted(found.items()))


def _shares(found: dict[int, int]) -> str:
    """The most frequent values of a histogram: "8 (61%), 7 (30%), 9 (8%), 2 others"."""
    total = sum(found.values())
    best = sorted(found, key=lambda value: -found[value])[:5]
    text = ", ".join(f"{value} ({found[value] / total:.0%})" for value in best)
    return text if len(found) <= len(best) else f"{text}, {len(found) - len(best)} others"


def _windows(windows: list[dict[str, int | None]]) -> str:
    parts = [f"; {w['layers']} layers see {w['window']} tokens" for w in windows if w["window"] is not None]
    return "".join(parts)


def _share(count: int, total: int) -> str:
    return "yes" if count == total else "no" if count == 0 else f"{count} of {total} modules"
