"""Models of known shape with random weights: what speed and memory are measured on where no real checkpoint is at hand.

A synthetic checkpoint is read like any other, only that a tensor is drawn when it is asked for, on the device that
asks; `write_folder` makes files of it. Scales are such that every Linear turns activations of order 1 into such of
order 1.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from gptq_api.checkpoint.checkpoint import Checkpoint
from gptq_api.checkpoint.device_reader import DeviceReader
from gptq_api.checkpoint.files import WeightFiles
from gptq_api.checkpoint.module import ModuleShape
from gptq_api.checkpoint.parts import TensorPart
from gptq_api.checkpoint.quant_config import QuantConfig
from gptq_api.checkpoint.tensors import TensorStore
from gptq_api.model.config import read_config
from gptq_api.model.eagle import head_shapes, read_head
from gptq_api.model.modules import all_modules
from gptq_api.text.folder import checkpoint_folder

_DEVIATION = 4.64
"""of a uniform nibble around its zero point, 8"""
_BYTE_DEVIATION = 73.9
"""of a uniform signed byte"""
_SYMMETRIC_WORD = 0x77777777
_SHARD_BYTES = 2 * 2**30

Kind = Literal["qweight", "qzeros", "scales", "g_idx", "norm", "dense"]


def _shape(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-160m": _shape(768, 3072, 12, 12, 12, 32000),
    "tinyllama-1.1b": _shape(2048, 5632, 22, 32, 4, 32000),
    "llama-7b": _shape(4096, 11008, 32, 32, 32, 32000),
    "llama-13b": _shape(5120, 13824, 40, 40, 40, 32000),
    "llama-3-8b": _shape(4096, 14336, 32, 32, 8, 128256, rope_theta=500000.0, max_position_embeddings=8192),
    "llama-70b": _shape(8192, 28672, 80, 64, 8, 32000),
}
"""name -> what config.json says of it; positions beyond LLaMA-1's 2048, so that 2048 tokens leave room for an answer"""


@dataclass(frozen=True)
class _Spec:
    kind: Kind
    shape: tuple[int, ...]
    scale: float = 0.0
    group_size: int = 0
    """of a g_idx"""
    seed: str = ""
    """what is drawn alike wherever this is the same; of a shuffled g_idx, since Linears with the same input share it"""

    @property
    def dtype(self) -> torch.dtype:
        return torch.int32 if self.kind in ("qweight", "qzeros", "g_idx") else torch.float16


class SyntheticStore(TensorStore):
    """The tensors of a synthetic checkpoint; the same ones at every reading on the same kind of device."""

    def __init__(self, weights: WeightFiles, specs: dict[str, _Spec], device: torch.device, *, in_bytes: bool) -> None:
        """`in_bytes`: dense weights are uniform signed bytes, which a CPU draws in a third of the time that normal
        numbers take."""
        self.weights, self.metadata = weights, {}
        self._specs, self._device, self._in_bytes = specs, device, in_bytes

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._specs)

    @property
    def device(self) -> torch.device:
        return self._device

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    def file(self, name: str) -> Path:
        return self.weights.files[0]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._specs[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._specs[name].dtype

    def dtype_name(self, name: str) -> str:
        return str(self.dtype(name)).removeprefix("torch.")

    def on(self, reader: DeviceReader) -> SyntheticStore:
        return SyntheticStore(self.weights, self._specs, reader.device, in_bytes=False)

    def prefetch(self, names: Iterable[str], parts: Mapping[str, TensorPart]) -> None:
        """Nothing is read."""

    def own(self, name: str, part: TensorPart | None = None) -> Tensor:
        return self.read(name, part)

    def read(self, name: str, part: TensorPart | None = None) -> Tensor:
        drawn = self._drawn(name)
        return drawn if part is None else part.of(drawn).clone(memory_format=torch.contiguous_format)

    def _drawn(self, name: str) -> Tensor:
        spec, device = self._specs[name], self._device
        generator = torch.Generator(device).manual_seed(zlib.crc32((spec.seed or name).encode()))
        if spec.kind == "qweight":
            # Eight bytes at a time: a CPU draws numbers, not bytes.
            words = torch.empty(math.prod(spec.shape) // 2, dtype=torch.int64, device=device)
            return words.random_(-(2**63), None, generator=generator).view(torch.int32).view(spec.shape)
        if spec.kind == "qzeros":
            return torch.full(spec.shape, _SYMMETRIC_WORD, dtype=torch.int32, device=device)
        if spec.kind == "g_idx":
            order = torch.arange(spec.shape[0], device=device)
            if spec.seed:
                order = torch.randperm(spec.shape[0], generator=generator, device=device)
            return (order // spec.group_size).to(torch.int32)
        if spec.kind == "norm":
            return torch.ones(spec.shape, dtype=torch.float16, device=device)
        if spec.kind == "scales":
            return torch.rand(spec.shape, generator=generator, device=device).add_(0.5).mul_(spec.scale).half()
        if self._in_bytes:
            words = torch.empty(-(-math.prod(spec.shape) // 8), dtype=torch.int64, device=device)
            drawn = words.random_(-(2**63), None, generator=generator).view(torch.int8)[: math.prod(spec.shape)]
            return drawn.view(spec.shape).half().mul_(spec.scale / _BYTE_DEVIATION)
        return torch.randn(spec.shape, generator=generator, device=device, dtype=torch.float16).mul_(spec.scale)


def synthetic_checkpoint(
    model: str, folder: Path, *, group_size: int = 128, act_order: bool = False, dense: bool = False
) -> Checkpoint:
    """A checkpoint of that shape (a key of SHAPES) in 4 bits, symmetric, or in float16 where `dense`.

    Writes config.json and a tokenizer into `folder`. KeyError for an unknown name.
    """
    write_small_files(model, folder, None if dense else group_size, act_order)
    config = read_config(folder)
    hidden, residual = config.hidden_size, 1 / math.sqrt(2 * config.num_hidden_layers)
    specs = {
        "model.embed_tokens.weight": _Spec("dense", (config.vocab_size, hidden), 1.0),
        "model.norm.weight": _Spec("norm", (hidden,)),
        "lm_head.weight": _Spec("dense", (config.vocab_size, hidden), hidden**-0.5),
    }
    for index in range(config.num_hidden_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            specs[f"model.layers.{index}.{norm}.weight"] = _Spec("norm", (hidden,))
    modules = {}
    for name, module in all_modules(config):
        k, n = module.in_features, module.out_features
        # What ends in the residual stream is smaller, so that the stream stays of order 1 through all layers.
        scale = k**-0.5 * (residual if module.ends_in_stream else 1.0)
        if dense:
            specs[f"{name}.weight"] = _Spec("dense", (n, k), scale)
            continue
        groups = 1 if group_size < 0 else -(-k // group_size)
        modules[name] = ModuleShape(k, n, 4, groups)
        specs[f"{name}.qweight"] = _Spec("qweight", (k // 8, n))
        specs[f"{name}.qzeros"] = _Spec("qzeros", (groups, n // 8))
        specs[f"{name}.scales"] = _Spec("scales", (groups, n), scale / _DEVIATION)
        specs[f"{name}.g_idx"] = _Spec(
            "g_idx", (k,), 0.0, -(-k // groups), f"{name.removesuffix(module.name)}{module.joins}" if act_order else ""
        )
    weights = WeightFiles(folder, (folder / "random",), "random weights")
    store = SyntheticStore(weights, specs, torch.device("cpu"), in_bytes=True)
    return Checkpoint(folder, store, QuantConfig(), modules, 1, ())


def write_eagle_head(model: str, folder: Path, draft_vocab_size: int = 32000) -> None:
    """An EAGLE-3 head for a model of that shape, as published ones are: its widths, an output head of so many tokens at
    most, the served model's embedding."""
    shape = SHAPES[model]
    size, vocab_size = min(draft_vocab_size, shape["vocab_size"]), shape["vocab_size"]
    config = {**shape, "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": size}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "rms_norm_eps": 1e-5, **config}))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(1)
    tensors = {"d2t": torch.arange(size) * vocab_size // size - torch.arange(size)}
    for name, dims in head_shapes(read_head(folder, shape["num_hidden_layers"])).items():
        if len(dims) == 1:
            tensors[name] = torch.ones(dims, dtype=torch.float16)
        else:
            drawn = torch.randn(dims, generator=generator, device=device, dtype=torch.float16)
            tensors[name] = drawn.mul_(dims[1] ** -0.5).cpu()
    save_file(tensors, folder / "model.safetensors")


def write_folder(
    model: str, folder: Path, *, group_size: int = 128, act_order: bool = False, dense: bool = False
) -> None:
    """A complete model folder in shards of safetensors, drawn on the GPU where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = synthetic_checkpoint(model, folder, group_size=group_size, act_order=act_order, dense=dense)
    store = checkpoint.store
    if torch.cuda.is_available():
        with DeviceReader(torch.device("cuda")) as reader:
            store = store.on(reader)
    shards = _shards(store)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: store.read(name).cpu() for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(store: TensorStore) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(store.names):
        num_bytes = store.numel(name) * (2 if store.is_float(name) else 4)
        if shards[-1] and size + num_bytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards


def write_small_files(model: str, folder: Path, group_size: int | None, act_order: bool) -> None:
    """config.json, the demo's tokenizer with a vocabulary of the model's size, and what was quantized how
    (`group_size` None: nothing)."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[model]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if group_size is not None:
        quant = {"bits": 4, "group_size": group_size, "desc_act": act_order, "sym": True, "quant_method": "gptq"}
        (folder / "quantize_config.json").write_text(json.dumps(quant, indent=1))
    demo = checkpoint_folder("demo")
    tokenizer = json.loads((demo / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    # Words that no text is split into, so that whatever random weights sample has a text.
    vocabulary |= {f"Ġ~{i}": i for i in range(len(vocabulary), shape["vocab_size"])}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    settings = json.loads((demo / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["model_max_length"] = shape["max_position_embeddings"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
