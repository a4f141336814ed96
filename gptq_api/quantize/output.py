"""The checkpoint folder: weights in shards, configs in the words every program reads, tokenizer, model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_api import __version__
from gptq_api.checkpoint.checkpoint import Checkpoint, CheckpointError
from gptq_api.checkpoint.files import read_json
from gptq_api.errors import writing
from gptq_api.model.config import LlamaConfig
from gptq_api.model.modules import all_modules, layer_prefix
from gptq_api.model.stored import has_head
from gptq_api.quantize.driver import Recipe, stored_dtype
from gptq_api.quantize.work import GOES_ON, WorkFolder, save_tensors

MAX_SHARD_BYTES = 4 * 2**30
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def write_checkpoint(
    source: Checkpoint, config: LlamaConfig, recipe: Recipe, card: str, work: WorkFolder, max_shard_bytes: int
) -> None:
    """Out of the finished layers in `work`. At most one shard is in memory."""
    folder = work.path / "checkpoint"
    rest = sum(2 * source.store.numel(name) for name in source.store.names) - sum(
        2 * module.in_features * module.out_features for _, module in all_modules(config)
    )
    with writing(folder, rest + work.num_bytes, GOES_ON):
        try:
            _write_files(source, config, recipe, card, work, folder, max_shard_bytes)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint only takes room
            raise
    work.finish(folder)


def _write_files(
    source: Checkpoint, config: LlamaConfig, recipe: Recipe, card: str, work: WorkFolder, folder: Path, max_bytes: int
) -> None:
    if folder.exists():  # of a run that was stopped while it wrote
        shutil.rmtree(folder)
    folder.mkdir()
    _write_weights(source, config, work, folder, max_bytes)
    quantization = quantization_config(recipe)
    raw = read_json(source.folder / "config.json")
    key = "torch_dtype" if "torch_dtype" in raw else "dtype"
    dtype = str(stored_dtype(source)).removeprefix("torch.")
    _write_json(folder / "config.json", {**raw, key: dtype, "quantization_config": quantization})
    _write_json(folder / "quantize_config.json", quantization)
    for name in _COPIED:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    (folder / "README.md").write_text(card, encoding="utf-8")


def quantization_config(recipe: Recipe) -> dict[str, Any]:
    """The keys of AutoGPTQ, which GPTQModel and transformers read too; GPTQModel calls two of them by other names."""
    s = recipe.settings
    form = "gptq" if recipe.zero_version == 1 else "gptq_v2"
    return {
        "bits": s.bits,
        "group_size": s.group_size,
        "desc_act": s.desc_act,
        "static_groups": s.static_groups,
        "act_group_aware": s.act_group_aware,
        "sym": s.sym,
        "true_sequential": True,
        "damp_percent": s.damp_percent,
        "lm_head": False,
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "method": "gptq",
        "checkpoint_format": form,
        "format": form,
        "meta": {"quantizer": [f"gptq-api:{__version__}"]},
    }


def _write_weights(
    source: Checkpoint, config: LlamaConfig, work: WorkFolder, folder: Path, max_shard_bytes: int
) -> None:
    """One file, or shards with an index where it would be larger than `max_shard_bytes`."""
    shards: list[dict[str, int]] = []
    shard: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        save_tensors(shard, folder / f"shard-{len(shards)}", {"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in shard.items()})

    for name, tensor in _tensors(source, config, work):
        if shard and size + tensor.nbytes > max_shard_bytes:
            flush()
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    flush()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for i, name in enumerate(names):
        (folder / f"shard-{i}").rename(folder / name)
        # The library makes files that only their owner can read; these are to be shared like the others.
        shutil.copymode(folder, folder / name)
        (folder / name).chmod((folder / name).stat().st_mode & 0o666)
    if len(shards) > 1:
        weight_map = {tensor: name for name, sizes in zip(names, shards, strict=True) for tensor in sizes}
        total = sum(sum(sizes.values()) for sizes in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _tensors(source: Checkpoint, config: LlamaConfig, work: WorkFolder) -> Iterator[tuple[str, Tensor]]:
    """Everything there is to store, layer after layer."""
    dtype = stored_dtype(source)
    quantized = {f"{name}.weight" for name, _ in all_modules(config)}
    rest = [
        name for name in sorted(source.store.names) if name not in quantized and name.endswith((".weight", ".bias"))
    ]
    if config.ties_head(has_head(source)) and "lm_head.weight" in rest:
        rest.remove("lm_head.weight")

    def stored(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            tensor = source.store.read(name).to(dtype).contiguous()
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{source.store.file(name)}: tensor {name} does not fit {dtype}")
            yield name, tensor

    yield from stored([name for name in rest if not name.startswith("model.layers.")])
    for index in range(config.num_hidden_layers):
        prefix = layer_prefix(index)
        yield from stored([name for name in rest if name.startswith(prefix)])
        layer = work.read(index)
        assert layer is not None
        yield from layer[0].items()


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
