"""A checkpoint becomes weights: every tensor checked against config.json, every Linear given to the kernel that takes
it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_api.checkpoint.checkpoint import Checkpoint, CheckpointError, GPTQTensors
from gptq_api.checkpoint.module import Outputs, group_size_of, is_permuted, parts_of
from gptq_api.checkpoint.parts import TensorPart
from gptq_api.kernels.order import of_kernel
from gptq_api.model.backend import Backend, PackError, Role
from gptq_api.model.config import LlamaConfig
from gptq_api.model.layers.linear import Linear, SplitLinear
from gptq_api.model.layers.norm import HeadNorm, RMSNorm
from gptq_api.model.layers.rotary import Rotary
from gptq_api.model.merge import merge, merge_dense, mergeable
from gptq_api.model.modules import Joint, Module, layer_prefix, modules, parts
from gptq_api.model.progress import LoadProgress
from gptq_api.model.shard import UNIT, WHOLE, Shard, cut, cut_order, outputs
from gptq_api.model.stored import (
    IGNORED,
    LAYER,
    check_bias,
    check_head,
    check_layers,
    check_module,
    has_head,
    head_notes,
    slow_notes,
    unused_notes,
)
from gptq_api.model.weights import LayerWeights, LlamaWeights
from gptq_api.types import LinearFacts

_PLAIN, _HEAD = Role(), Role(head=True)
_Dense = tuple[Tensor, Tensor | None]
"""weight and bias"""


@dataclass(frozen=True)
class LoadReport:
    """What was decided while loading."""

    warnings: tuple[str, ...]
    linears: tuple[LinearFacts, ...]
    """a dense head is not among them"""
    num_kept: int
    """of those: made by an earlier start"""

    @property
    def kernels(self) -> dict[str, int]:
        """kernel -> number of Linears that it takes"""
        found: Counter[str] = Counter()
        for linears in self.linears:
            found[linears.kernel] += linears.num
        return dict(found)


class _Loader:
    def __init__(self, checkpoint: Checkpoint, config: LlamaConfig, backend: Backend, shard: Shard) -> None:
        self.checkpoint, self.config, self.backend, self.device = checkpoint, config, backend, backend.device
        self.shard, self.own = shard, shard.config(config)
        self.warnings = list(checkpoint.warnings)
        self.linears: Counter[tuple[str, str, str]] = Counter()
        """by kernel, bits and group size"""
        self.num_kept = 0
        self.slow: dict[str, Counter[str]] = {}
        """why -> kinds of modules ("down_proj") that take the slow path for that reason"""

    def norm(self, name: str) -> RMSNorm:
        weight = self.checkpoint.tensor(f"{name}.weight", (self.config.hidden_size,))
        return RMSNorm(weight.to(self.device), self.config.rms_norm_eps)

    def head_norm(self, layer: str) -> HeadNorm | None:
        c = self.config
        if not c.family.qk_norm:
            return None
        q, k = (
            self.checkpoint.tensor(f"{layer}self_attn.{p}_norm.weight", (c.head_dim,)).to(self.device) for p in "qk"
        )
        return HeadNorm(q, k, self.own.num_attention_heads, self.own.num_key_value_heads, c.rms_norm_eps)

    def linear(self, layer: str, joint: Joint, role: Role = _PLAIN) -> Linear:
        """One Linear of the forward pass, of modules with the same input; merged where the tensors allow it."""
        table = parts(self.config, joint)
        names = [layer + module.name for module in table]
        pairs = list(zip(names, table, strict=True))
        linear = self._kept(pairs)
        if linear is None:
            chosen = self._chosen(table, role)
            found = [
                (len(pairs) > 1 and self._kept([pair])) or self._read(*pair, outputs_of_it)
                for pair, outputs_of_it in zip(pairs, chosen, strict=True)
            ]
            found, role = self._cut(found, table, role)
            linear = self._build(found, names, role)
        self._count(linear, names)
        return linear

    def _count(self, linear: Linear, names: list[str]) -> None:
        """A Linear made of these modules."""
        shapes = [self.checkpoint.modules[name] for name in names if name in self.checkpoint.modules]
        bits = " + ".join(dict.fromkeys(str(shape.bits) for shape in shapes))
        sizes = " + ".join(dict.fromkeys(str(group_size_of(shape)) for shape in shapes))
        self.linears[linear.kernel, bits, sizes] += 1

    def mlp(self, layer: str) -> tuple[Linear, Linear]:
        """(gate_up, down). Where gate and up are packed in the order in which down wants its inputs, down need not
        gather."""
        down = self.linear(layer, "down")
        order = of_kernel(down.order)
        gate_up = self.linear(layer, "gate_up", Role(sorted_by_producer=True, paired=True, half_order=order))
        return gate_up, self.backend.fed_by(gate_up, down)

    def _kept(self, pairs: list[tuple[str, Module]]) -> Linear | None:
        """What an earlier start made of these modules, as one."""
        if not all(name in self.checkpoint.modules for name, _ in pairs):
            return None
        for pair in pairs:
            self._check(*pair)
        linear = self.backend.kept(_joined([name for name, _ in pairs]))
        self.num_kept += linear is not None
        return linear

    def _chosen(self, table: list[Module], role: Role) -> Sequence[Outputs | None]:
        """What is to be read of each; None: all. In an order of down's a rank's outputs lie all over the tensors, and
        are taken out of them on the device."""
        if self.shard.is_whole or role.half_order is not None:
            return [None] * len(table)
        return [outputs(self.config, module, self.shard) for module in table]

    def _cut(
        self, found: list[Linear | GPTQTensors | _Dense], table: list[Module], role: Role
    ) -> tuple[list[Linear | GPTQTensors | _Dense], Role]:
        """The rank's outputs of what was read whole, and what their Linear is to its neighbours then."""
        if self.shard.is_whole or role.half_order is None:
            return found, role
        each = [outputs(self.config, module, self.shard) for module in table]
        chosen = [torch.cat([torch.arange(r.start, r.stop) for r in ranges]) for ranges in each]
        if self._takes_order(found, len(torch.cat(chosen))):
            chosen = cut_order(role.half_order, self.shard, table)
        parts: list[Linear | GPTQTensors | _Dense] = []
        for whole, of_it in zip(found, chosen, strict=True):
            assert isinstance(whole, GPTQTensors | tuple), "nothing is kept of a part"
            parts.append(cut(whole, of_it))
        return parts, replace(role, half_order=None)

    def parts(self, layer: str) -> dict[str, TensorPart]:
        """What will be read of a layer's tensors; of those that are not named, all."""
        found: dict[str, TensorPart] = {}
        for module in () if self.shard.is_whole else modules(self.config):
            name, chosen = layer + module.name, outputs(self.config, module, self.shard)
            if module.joins == "gate_up" and self._orders(layer):
                continue
            if name in self.checkpoint.modules:
                found |= parts_of(name, self.checkpoint.modules[name], chosen)
            else:
                found[f"{name}.weight"] = TensorPart(0, chosen)
        return found

    def _orders(self, layer: str) -> bool:
        """Whether `mlp` will want gate and up in an order of down's."""
        [down] = parts(self.config, "down")
        shape = self.checkpoint.modules.get(layer + down.name)
        if shape is None:
            return False
        num_outputs = sum(map(len, outputs(self.config, down, self.shard)))
        choice = self.backend.kernel(shape.bits, shape.in_features, num_outputs, group_size_of(shape))
        return choice.orders_outputs and is_permuted(self.checkpoint.store, layer + down.name, shape)

    def _takes_order(self, found: list[Linear | GPTQTensors | _Dense], num_outputs: int) -> bool:
        """Whether these become a Linear whose outputs may have any order, so that `fed_by` takes them for sorted."""
        quantized = [m for m in found if isinstance(m, GPTQTensors)]
        if len(quantized) < len(found) or not mergeable(quantized):
            return False
        first = quantized[0]
        return self.backend.kernel(first.bits, first.in_features, num_outputs, first.group_size).orders_outputs

    def _build(self, found: list[Linear | GPTQTensors | _Dense], names: list[str], role: Role) -> Linear:
        quantized = [m for m in found if isinstance(m, GPTQTensors)]
        if len(quantized) == len(found) and mergeable(quantized):
            return self._quantized(merge(quantized), names, role)
        dense = [m for m in found if isinstance(m, tuple)]
        if len(dense) == len(found):
            return self.backend.dense(*merge_dense(dense))
        return SplitLinear([self._one(m, name) for m, name in zip(found, names, strict=True)])

    def lm_head(self, embedding: Tensor) -> Linear:
        """Tied, untied, duplicated or quantized."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        if not has_head(self.checkpoint) or self.config.ties_head(True):
            return self._tied(embedding, shape)
        if "lm_head" in self.checkpoint.modules:
            head = Module("lm_head", shape[1], shape[0], "o")
            linear = self._kept([("lm_head", head)])
            if linear is None:
                [chosen] = self._chosen([head], _HEAD)
                linear = self._one(self._read("lm_head", head, chosen), "lm_head", _HEAD)
            self._count(linear, ["lm_head"])
            return linear
        return self._head(self.checkpoint.tensor("lm_head.weight", shape, self._rows_of_head))

    @property
    def _rows_of_head(self) -> Outputs | None:
        return None if self.shard.is_whole else (self.shard.of(self.config.vocab_size, UNIT),)

    def _head(self, weight: Tensor, *, tied: bool = False) -> Linear:
        """Of this rank's rows."""
        linear = self.backend.head(weight, tied=tied)
        if not linear.kernel.startswith("dense"):
            self._count(linear, [])
        return linear

    def _tied(self, embedding: Tensor, shape: tuple[int, int]) -> Linear:
        check_head(self.checkpoint, self.config)
        self.warnings += head_notes(self.checkpoint, self.config)
        part = self.shard.of(len(embedding), UNIT)
        embedding = embedding[part.start : part.stop]
        if self.checkpoint.has("lm_head.weight"):
            head = self.checkpoint.tensor("lm_head.weight", shape, self._rows_of_head)
            if not torch.equal(head.to(device=embedding.device, dtype=embedding.dtype), embedding):
                self.warnings.append("lm_head.weight is not used: config.json ties the embedding to the head")
        return self._head(embedding, tied=True)

    def _read(self, name: str, module: Module, chosen: Outputs | None) -> GPTQTensors | _Dense:
        """`chosen`: of these outputs; None: of all."""
        self._check(name, module)
        if name not in self.checkpoint.modules:
            weight = self.checkpoint.tensor(f"{name}.weight", (module.out_features, module.in_features), chosen)
            bias = self.checkpoint.bias(name)
            if bias is not None and bias.shape != (module.out_features,):
                raise CheckpointError(
                    f"{self.checkpoint.files[0]}: tensor {name}.bias is {tuple(bias.shape)}, config.json gives "
                    f"({module.out_features},); use the config.json of this model"
                )
            return weight, bias if bias is None or chosen is None else TensorPart(0, chosen).of(bias).contiguous()
        return self.checkpoint.gptq(name, chosen)

    def _check(self, name: str, module: Module) -> None:
        """What the headers tell."""
        check_bias(self.checkpoint, self.config, name, module)
        if name in self.checkpoint.modules:
            check_module(self.checkpoint, name, module)

    def _one(self, found: Linear | GPTQTensors | _Dense, name: str, role: Role = _PLAIN) -> Linear:
        if isinstance(found, GPTQTensors):
            return self._quantized(found, [name], role)
        return self.backend.dense(*found) if isinstance(found, tuple) else found

    def _quantized(self, t: GPTQTensors, names: list[str], role: Role) -> Linear:
        reason = self.backend.kernel(t.bits, t.in_features, t.out_features, t.group_size).reason
        if reason is not None:
            self.slow.setdefault(reason, Counter()).update(name.rpartition(".")[2] for name in names)
        try:
            return self.backend.quantized(t, role, _joined(names))
        except PackError as error:
            file = self.checkpoint.store.file(f"{names[0]}.qweight")
            raise CheckpointError(f"{file}: {names[0]}: {error}") from None

    def finish(self) -> LoadReport:
        check_layers(self.checkpoint, self.config)
        self.warnings += unused_notes(self.checkpoint, self.config) + slow_notes(self.slow)
        linears = tuple(LinearFacts(*kind, num) for kind, num in self.linears.items())
        return LoadReport(tuple(self.warnings), linears, self.num_kept)


def _joined(names: list[str]) -> str:
    return " + ".join(names)


def load_llama(
    checkpoint: Checkpoint, config: LlamaConfig, max_model_len: int, backend: Backend, shard: Shard = WHOLE
) -> tuple[LlamaWeights, LoadReport]:
    """Read every tensor once. CheckpointError names the first that is missing, misshapen or not finite. `shard`: what
    one rank keeps of them, and reads; ranks may load at the same time.

    The qkv and gate_up of a layer may have an InputOrder that the norms before them apply to what they write. No down
    and no head has one; an o may have one that it applies by itself.
    """
    with backend.reading(checkpoint) as read:
        return _load(read, config, max_model_len, backend, shard)


def _load(
    checkpoint: Checkpoint, config: LlamaConfig, max_model_len: int, backend: Backend, shard: Shard
) -> tuple[LlamaWeights, LoadReport]:
    load = _Loader(checkpoint, config, backend, shard)
    prefetch = _Prefetch(checkpoint, load.parts)
    prefetch.layer(0)
    embedding = checkpoint.tensor("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    tied = config.ties_head(has_head(checkpoint))
    embedding = embedding.to(device=backend.device, dtype=backend.embedding_dtype(embedding.dtype, tied))
    layers = []
    # A window that no text outgrows is none.
    windows = [None if w is None or w >= max_model_len else w for w in config.windows]
    # Of ranks, which load together, one tells how far it is.
    with LoadProgress("loading layers", len(windows)) if shard.rank == 0 else nullcontext() as progress:
        for index, window in enumerate(windows):
            prefetch.layer(index + 1)
            layer = layer_prefix(index)
            gate_up, down = load.mlp(layer)
            layers.append(
                LayerWeights(
                    input_norm=load.norm(f"{layer}input_layernorm"),
                    qkv=load.linear(layer, "qkv", Role(sorted_by_producer=True)),
                    head_norm=load.head_norm(layer),
                    window=window,
                    o=load.linear(layer, "o"),
                    post_attention_norm=load.norm(f"{layer}post_attention_layernorm"),
                    gate_up=gate_up,
                    down=down,
                )
            )
            if progress is not None:
                progress.advance()
    weights = LlamaWeights(
        config=load.own,
        shard=shard,
        embedding=embedding,
        layers=layers,
        norm=load.norm("model.norm"),
        lm_head=load.lm_head(embedding),
        rotary=Rotary(config.rope, config.head_dim, max_model_len, backend.device),
    )
    return weights, load.finish()


class _Prefetch:
    """Lets the next layer be read while this one is checked and packed. What nothing will ask for is left out."""

    def __init__(self, checkpoint: Checkpoint, parts: Callable[[str], dict[str, TensorPart]]) -> None:
        """`parts`: what is read of the tensors of a layer, by its prefix."""
        self._store, self._parts = checkpoint.store, parts
        self._names: defaultdict[int, list[str]] = defaultdict(list)
        for name in sorted(self._store.names):
            layer = LAYER.match(name)
            if layer and not name.endswith(IGNORED):
                self._names[int(layer[1])].append(name)

    def layer(self, index: int) -> None:
        if names := self._names[index]:
            self._store.prefetch(names, self._parts(layer_prefix(index)))
