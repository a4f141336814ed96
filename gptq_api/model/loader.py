"""A checkpoint folder becomes a Llama: every tensor checked against config.json, every Linear given to the kernel
that takes it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_api.checkpoint.checkpoint import Checkpoint, CheckpointError, GPTQTensors
from gptq_api.checkpoint.device_reader import DeviceReader
from gptq_api.kernels import gemm
from gptq_api.layers.attention import Attention
from gptq_api.layers.linear import DenseLinear, GPTQLinear, Linear, PackedGPTQLinear, SplitLinear, choose_kernel
from gptq_api.layers.norm import HeadNorm, RMSNorm
from gptq_api.layers.rotary import Rotary
from gptq_api.model.config import LlamaConfig
from gptq_api.model.llama import Llama, LlamaLayer
from gptq_api.model.merge import merge, merge_dense, mergeable
from gptq_api.model.progress import LoadProgress

_IGNORED = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "gptq_bits",
    "gptq_groupsize",
    "gptq_sym",
)
"""Tensors of older writers that nothing needs: rotary frequencies are computed anew in float32."""
_LAYER = re.compile(r"^model\.layers\.(\d{1,9})\.")
_PARTS = ("qweight", "qzeros", "zeros", "scales", "g_idx", "bias", "weight")


@dataclass(frozen=True)
class LoadReport:
    """What was decided while loading."""

    warnings: tuple[str, ...]
    paths: dict[str, int]
    """kernel -> number of Linears that use it"""


class _Loader:
    def __init__(self, checkpoint: Checkpoint, config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint, self.config, self.device, self.dtype = checkpoint, config, device, dtype
        self.warnings = list(checkpoint.warnings)
        self.paths: Counter[str] = Counter()
        self.slow: dict[str, Counter[str]] = {}
        """why -> kinds of modules ("down_proj") that take the slow path for that reason"""
        self.used: set[str] = set()

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.used.add(name)
        return self.checkpoint.tensor(name, shape)

    def norm(self, name: str) -> RMSNorm:
        weight = self.tensor(f"{name}.weight", (self.config.hidden_size,))
        return RMSNorm(weight.to(self.device), self.config.rms_norm_eps)

    def attention(self, layer: str, window: int | None) -> Attention:
        c = self.config
        norm = None
        if c.family.qk_norm:
            q, k = (self.tensor(f"{layer}.self_attn.{p}_norm.weight", (c.head_dim,)).to(self.device) for p in "qk")
            norm = HeadNorm(q, k, c.num_attention_heads, c.num_key_value_heads, c.rms_norm_eps)
        return Attention(c.num_attention_heads, c.num_key_value_heads, c.head_dim, window, norm)

    def linear(self, names: list[str], in_features: int, out_features: list[int], *, folded: bool = False) -> Linear:
        """One Linear for modules with the same input, their outputs side by side; merged where the tensors allow it.

        `folded`: an act-order that CUDA kernels would gather by becomes the Linear's `perm`.
        """
        modules = [self._read(*args) for args in zip(names, [in_features] * len(names), out_features, strict=True)]
        linear = self._build(modules, names, folded=folded)
        self.paths[linear.path] += 1
        return linear

    def mlp(self, layer: str) -> tuple[Linear, Linear]:
        """(gate_up, down). On CUDA gate and up write their outputs in the order in which down wants them."""
        hidden, ffn = self.config.hidden_size, self.config.intermediate_size
        down_name, names = f"{layer}.mlp.down_proj", [f"{layer}.mlp.{part}_proj" for part in ("gate", "up")]
        down = self._build([self._read(down_name, ffn, hidden)], [down_name])
        order = down.gather if isinstance(down, PackedGPTQLinear) else None
        modules = [self._read(name, hidden, ffn) for name in names]
        gate_up = self._build(modules, names, folded=True, paired=True, half_order=order)
        if isinstance(down, PackedGPTQLinear) and isinstance(gate_up, PackedGPTQLinear):
            down = down.without_gather()
        self.paths[gate_up.path] += 1
        self.paths[down.path] += 1
        return gate_up, down

    def _build(
        self,
        modules: list[GPTQTensors | tuple[Tensor, Tensor | None]],
        names: list[str],
        *,
        folded: bool = False,
        paired: bool = False,
        half_order: Tensor | None = None,
    ) -> Linear:
        """`paired` and `half_order` (int [N / 2], of the outputs of either half) hold where the result is packed."""
        quantized = [m for m in modules if isinstance(m, GPTQTensors)]
        if len(quantized) == len(modules) and mergeable(quantized):
            merged = merge(quantized)
            if not self._takes_packed(merged):
                return self._quantized(merged, names)
            order = None if half_order is None else torch.cat((half_order, half_order + merged.out_features // 2))
            return self._packed(merged, names, folded=folded, paired=paired, out_order=order)
        if not quantized:
            return self._one(merge_dense([m for m in modules if not isinstance(m, GPTQTensors)]), names)
        return SplitLinear([self._one(m, [name]) for m, name in zip(modules, names, strict=True)])

    def lm_head(self, embedding: Tensor) -> Linear:
        """Tied, untied, duplicated or quantized."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        if not has_head(self.checkpoint) or self.config.ties_head(True):
            return self._tied(embedding, shape)
        if "lm_head" in self.checkpoint.modules:
            return self.linear(["lm_head"], shape[1], [shape[0]])
        return DenseLinear(self._head_weight(self.tensor("lm_head.weight", shape)))

    def _tied(self, embedding: Tensor, shape: tuple[int, int]) -> Linear:
        if self.config.tie_word_embeddings is False:
            raise CheckpointError(
                f"{self.checkpoint.files[0]}: tensor lm_head.weight is missing and config.json says that "
                "tie_word_embeddings is false; download the checkpoint again, or set it if the model ties them"
            )
        if self.config.tie_word_embeddings is None:
            self.warnings.append(
                "the embedding serves as the head: there is no lm_head.weight, and config.json does not say "
                "tie_word_embeddings"
            )
        if "lm_head" in self.checkpoint.modules:
            self.used.update(f"lm_head.{part}" for part in _PARTS)
            self.warnings.append("the quantized lm_head is not used: config.json ties the embedding to the head")
        if self.checkpoint.has("lm_head.weight"):
            head = self.tensor("lm_head.weight", shape).to(device=embedding.device, dtype=embedding.dtype)
            if not torch.equal(head, embedding):
                self.warnings.append("lm_head.weight is not used: config.json ties the embedding to the head")
        return DenseLinear(self._head_weight(embedding))

    def _head_weight(self, weight: Tensor) -> Tensor:
        """float32 on the CPU: bfloat16 logits have 8 bits, and the greedy token would be decided by rounding."""
        if self.device.type == "cpu":
            return weight.to(torch.float32)
        return weight.to(device=self.device, dtype=self.dtype)

    def _read(self, name: str, in_features: int, out_features: int) -> GPTQTensors | tuple[Tensor, Tensor | None]:
        self.used.update(f"{name}.{part}" for part in _PARTS)
        if _must_have_bias(self.config, name) and not self.checkpoint.has(f"{name}.bias"):
            raise CheckpointError(
                f"{self.checkpoint.files[0]}: tensor {name}.bias is missing, and {self.config.family.title} with this "
                "config.json has it; download the checkpoint again"
            )
        shape = self.checkpoint.modules.get(name)
        if shape is None:
            weight = self.checkpoint.tensor(f"{name}.weight", (out_features, in_features))
            bias = self.checkpoint.bias(name)
            if bias is not None and bias.shape != (out_features,):
                raise CheckpointError(
                    f"{self.checkpoint.files[0]}: tensor {name}.bias is {tuple(bias.shape)}, config.json gives "
                    f"({out_features},); use the config.json of this model"
                )
            return weight, bias
        if (shape.in_features, shape.out_features) != (in_features, out_features):
            file = self.checkpoint.store.file(f"{name}.qweight")
            raise CheckpointError(
                f"{file}: tensor {name}.qweight has {shape.in_features} inputs and {shape.out_features} outputs, "
                f"config.json gives {in_features} and {out_features}; use the config.json of this model"
            )
        return self.checkpoint.gptq(name)

    def _one(self, module: GPTQTensors | tuple[Tensor, Tensor | None], names: list[str]) -> Linear:
        if isinstance(module, GPTQTensors):
            return self._quantized(module, names)
        weight, bias = (None if t is None else t.to(device=self.device, dtype=self.dtype) for t in module)
        assert weight is not None
        return DenseLinear(weight, bias)

    def _takes_packed(self, t: GPTQTensors) -> bool:
        choice = choose_kernel(t.bits, t.in_features, t.out_features, t.group_size, self.device, self.dtype)
        return choice.kernel == "cuda int4"

    def _packed(
        self,
        t: GPTQTensors,
        names: list[str],
        *,
        folded: bool = False,
        paired: bool = False,
        out_order: Tensor | None = None,
    ) -> PackedGPTQLinear:
        g_idx = t.g_idx if t.act_order else None
        try:
            weight = gemm.pack(
                t.qweight, t.scales, t.zeros, g_idx, t.group_size, self.device, paired=paired, out_order=out_order
            )
        except ValueError as error:
            file = self.checkpoint.store.file(f"{names[0]}.qweight")
            raise CheckpointError(f"{file}: {names[0]}: {error}") from None
        bias = None if t.bias is None else t.bias.to(device=self.device, dtype=self.dtype)
        if bias is not None and out_order is not None:
            bias = bias[out_order]
        return PackedGPTQLinear(weight, bias, folded=folded)

    def _quantized(self, t: GPTQTensors, names: list[str]) -> Linear:
        if self._takes_packed(t):
            return self._packed(t, names)
        linear = GPTQLinear.load(
            t.qweight, t.zeros, t.scales, t.g_idx, t.bits, t.group_size, t.bias, self.device, self.dtype
        )
        _, _, reason = linear.path.partition(": ")
        if reason:
            self.slow.setdefault(reason, Counter()).update(name.rpartition(".")[2] for name in names)
        return linear

    def finish(self) -> LoadReport:
        for name in sorted(self.checkpoint.store.names):
            layer = _LAYER.match(name)
            if layer and int(layer[1]) >= self.config.num_hidden_layers:
                raise CheckpointError(
                    f"{self.checkpoint.store.file(name)}: tensor {name} is beyond the {self.config.num_hidden_layers} "
                    "layers that config.json gives; use the config.json of this model"
                )
            if layer and name not in self.used and name.endswith("norm.weight"):
                raise CheckpointError(
                    f"{self.checkpoint.store.file(name)}: tensor {name} is unknown to {self.config.family.title}, "
                    "which config.json says it is; use the config.json of this model"
                )
        unused = sorted(n for n in self.checkpoint.store.names - self.used if not n.endswith(_IGNORED))
        if unused:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            self.warnings.append(f"tensor {unused[0]}{more} of the checkpoint is not used")
        for reason, kinds in self.slow.items():
            self.warnings.append(f"{', '.join(kinds)} ({kinds.total()} modules) take the slow path: {reason}")
        return LoadReport(tuple(self.warnings), dict(self.paths))


def load_llama(
    checkpoint: Checkpoint, config: LlamaConfig, max_model_len: int, device: torch.device, dtype: torch.dtype
) -> tuple[Llama, LoadReport]:
    """Read every tensor once. CheckpointError names the first that is missing, misshapen or not finite.

    On CUDA the qkv and gate_up of a layer may have a `perm`, which the norms before them have to apply to what they
    write. No o, no down and no head has one.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            checkpoint = checkpoint.on(stack.enter_context(DeviceReader(device)))
        return _load(checkpoint, config, max_model_len, device, dtype)


def _load(
    checkpoint: Checkpoint, config: LlamaConfig, max_model_len: int, device: torch.device, dtype: torch.dtype
) -> tuple[Llama, LoadReport]:
    load = _Loader(checkpoint, config, device, dtype)
    prefetch = _Prefetch(checkpoint)
    prefetch.layer(0)
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    embedding = load.tensor("model.embed_tokens.weight", (config.vocab_size, hidden)).to(device)
    if device.type == "cpu" and config.ties_head(has_head(checkpoint)):
        # One tensor serves both ends; the head wants float32.
        embedding = embedding.to(torch.float32)
    elif device.type == "cuda":
        embedding = embedding.to(dtype)
    layers = []
    # A window that no text outgrows is none.
    windows = [None if w is None or w >= max_model_len else w for w in config.windows]
    with LoadProgress("loading layers", len(windows)) as progress:
        for index, window in enumerate(windows):
            prefetch.layer(index + 1)
            name = f"model.layers.{index}"
            qkv = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
            gate_up, down = load.mlp(name)
            layers.append(
                LlamaLayer(
                    input_norm=load.norm(f"{name}.input_layernorm"),
                    qkv=load.linear(qkv, hidden, [heads, kv, kv], folded=True),
                    attention=load.attention(name, window),
                    o=load.linear([f"{name}.self_attn.o_proj"], heads, [hidden]),
                    post_attention_norm=load.norm(f"{name}.post_attention_layernorm"),
                    gate_up=gate_up,
                    down=down,
                )
            )
            progress.advance()
    model = Llama(
        config=config,
        embedding=embedding,
        layers=layers,
        norm=load.norm("model.norm"),
        lm_head=load.lm_head(embedding),
        rotary=Rotary(config.rope, config.head_dim, max_model_len, device),
        windows=tuple(dict.fromkeys(windows)),
        stream_dtype=torch.float32 if device.type == "cpu" else dtype,
    )
    return model, load.finish()


class _Prefetch:
    """Lets the next layer be read while this one is checked and packed. What nothing will ask for is left out."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._store = checkpoint.store
        self._names: defaultdict[int, list[str]] = defaultdict(list)
        for name in sorted(self._store.names):
            layer = _LAYER.match(name)
            if layer and not name.endswith(_IGNORED):
                self._names[int(layer[1])].append(name)

    def layer(self, index: int) -> None:
        self._store.prefetch(self._names[index])


def has_head(checkpoint: Checkpoint) -> bool:
    """Whether the file has an output head of its own, quantized or not."""
    return checkpoint.has("lm_head.weight") or "lm_head" in checkpoint.modules


def _must_have_bias(config: LlamaConfig, name: str) -> bool:
    if name.endswith((".q_proj", ".k_proj", ".v_proj")):
        return config.attention_bias
    return ".mlp." in name and config.mlp_bias
