"""An EAGLE-3 head (arXiv:2503.01840; github.com/SafeAILab/EAGLE): one layer that guesses tokens from what the served
model made of those before.

Row i of a text sees the embedding of token i + 1 beside the feature of token i, and says token i + 2. A feature is `fc`
of what the served model's stream was before three of its layers; of a token that is only guessed it is the head's own
output for the token before. The layer is LLaMA's, but for the input of q, k and v: the normed embedding and the normed
feature side by side. The output head has rows for the commonest tokens alone; `d2t` says by how much their ids differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_api.checkpoint.checkpoint import Checkpoint, CheckpointError
from gptq_api.checkpoint.files import read_json
from gptq_api.model.backend import Backend
from gptq_api.model.config import LlamaConfig, parse_config
from gptq_api.model.keys import Keys
from gptq_api.model.layers.linear import Linear
from gptq_api.model.layers.norm import RMSNorm
from gptq_api.model.layers.rotary import Rotary
from gptq_api.model.merge import merge_dense
from gptq_api.model.weights import LayerWeights, LlamaWeights

_LAYER = "midlayer."
_EMBEDDING, _TARGETS = "embed_tokens.weight", "d2t"
_NOT_READ = ("t2d", "rotary_emb.inv_freq")
"""endings of names; t2d says the same as d2t, from the other side"""
_LAYOUT = "midlayer.*, fc.weight, norm.weight, lm_head.weight, d2t"


@dataclass(frozen=True)
class EagleConfig:
    """The numbers of one head."""

    llama: LlamaConfig
    """of its layer; the vocabulary is that of the served model"""
    draft_vocab_size: int
    """rows of the output head"""
    target_hidden_size: int
    """of the served model"""
    taps: tuple[int, ...]
    """Layers of the served model, ascending: the stream before each is a part of a feature. As many as it has layers:
    behind the last."""
    norm_before_residual: bool
    """the normed feature is what the layer adds to; otherwise the feature itself"""


@dataclass(frozen=True)
class EagleWeights:
    llama: LlamaWeights
    """one layer, whose qkv takes [embedding, feature], [M, 2H]; the embedding may be the served model's"""
    config: EagleConfig
    feature_norm: RMSNorm
    fc: Linear
    """[M, taps * target_hidden_size] -> [M, H]"""
    target_ids: Tensor | None
    """int64 [draft_vocab_size] on the device: which token each row of the output head is; None: that of its number"""
    num_bytes: int
    """without a borrowed embedding"""


def is_head(folder: Path) -> bool:
    """Whether config.json is that of an EAGLE-3 head: by its architecture, or by a vocabulary of its own."""
    raw = read_json(folder / "config.json")
    return "draft_vocab_size" in raw or any("eagle3" in name.lower() for name in _architectures(raw))


def _architectures(raw: dict[str, Any]) -> list[str]:
    named = raw.get("architectures")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def read_head(folder: Path, num_layers: int) -> EagleConfig:
    """Of config.json; `num_layers`: of the served model. CheckpointError names the key and the value."""
    source = str(folder / "config.json")
    raw = read_json(folder / "config.json")
    if "speculators_model_type" in raw or "Eagle3Speculator" in _architectures(raw):
        raise CheckpointError(f"{source} is in the layout of vLLM's speculators; take the head as published: {_LAYOUT}")
    llama = parse_config({**raw, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}, source)
    if llama.num_hidden_layers != 1:
        raise CheckpointError(f"{source}: num_hidden_layers is {llama.num_hidden_layers}; an EAGLE-3 head has 1 layer")
    keys, inner = Keys(raw, source), raw.get("eagle_config") or {}
    if not isinstance(inner, dict):
        raise CheckpointError(f"{source}: eagle_config is {inner!r} where an object is expected")
    if not Keys(inner, source).flag("use_aux_hidden_state", True):
        raise CheckpointError(f"{source}: use_aux_hidden_state is false; an EAGLE-3 head reads hidden states of layers")
    return EagleConfig(
        llama=llama,
        draft_vocab_size=keys.integer("draft_vocab_size", 1, llama.vocab_size, default=llama.vocab_size),
        target_hidden_size=keys.integer("target_hidden_size", 1, 2**17, default=llama.hidden_size),
        taps=_taps(raw, inner, source, num_layers),
        norm_before_residual=keys.flag("norm_before_residual", False),
    )


def _taps(raw: dict[str, Any], inner: dict[str, Any], source: str, num_layers: int) -> tuple[int, ...]:
    """At the top of the file they are layers before which the stream is taken, in eagle_config layers behind which."""
    key = "eagle_aux_hidden_state_layer_ids"
    ids, behind = (raw[key], 0) if raw.get(key) else (inner.get(key), 1)
    if not ids:
        taps = (2, num_layers // 2, num_layers - 3)
        if not 2 < num_layers // 2 < num_layers - 3:
            raise CheckpointError(
                f"{source} names no layers, and of {num_layers} the usual ones (2, {taps[1]} and {taps[2]}) are not "
                f"three in a row; name those that the head was made for with {key}"
            )
        return taps
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{source}: {key} is {ids!r} where a list of layers is expected")
    taps = tuple(sorted(i + behind for i in ids))
    if len(set(taps)) < len(taps) or not 0 <= taps[0] <= taps[-1] <= num_layers:
        raise CheckpointError(f"{source}: {key} is {ids!r}, which are not different layers of {num_layers}")
    return taps


def head_shapes(config: EagleConfig) -> dict[str, tuple[int, ...]]:
    """Every floating-point tensor that has to be there."""
    c = config.llama
    hidden, ffn = c.hidden_size, c.intermediate_size
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "hidden_norm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (heads, 2 * hidden),
        "self_attn.k_proj": (kv, 2 * hidden),
        "self_attn.v_proj": (kv, 2 * hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    return {
        "fc.weight": (hidden, len(config.taps) * config.target_hidden_size),
        **{f"{_LAYER}{name}.weight": shape for name, shape in layer.items()},
        "norm.weight": (hidden,),
        "lm_head.weight": (config.draft_vocab_size, hidden),
    }


def check_head(checkpoint: Checkpoint, config: EagleConfig) -> int:
    """Bytes of its tensors as they are stored. CheckpointError for what the headers show to be missing, of another
    shape, or of another kind of head."""
    shapes, store, c = head_shapes(config), checkpoint.store, config.llama
    if _EMBEDDING in store:
        shapes[_EMBEDDING] = (c.vocab_size, c.hidden_size)
    elif c.hidden_size != config.target_hidden_size:
        raise CheckpointError(
            f"{checkpoint.files[0]} has no {_EMBEDDING}, and the served model's is {config.target_hidden_size} wide, "
            f"not {c.hidden_size}; take a head that brings its own"
        )
    for name, shape in shapes.items():
        checkpoint.check(name, shape)
    if config.draft_vocab_size < c.vocab_size and _TARGETS not in store:
        raise CheckpointError(f"{checkpoint.files[0]}: tensor {_TARGETS} is missing; download the checkpoint again")
    biases = {name.removesuffix(".weight") + ".bias" for name, shape in shapes.items() if len(shape) == 2}
    for name in sorted(store.names - shapes.keys() - biases - {_TARGETS}):
        if not name.endswith(_NOT_READ):
            raise CheckpointError(
                f"{store.file(name)}: tensor {name} is none of an EAGLE-3 head ({_LAYOUT}); take one of that layout"
            )
    return sum(prod(store.shape(name)) * (store.dtype(name) or torch.float32).itemsize for name in shapes)


def load_head(
    checkpoint: Checkpoint, config: EagleConfig, served: LlamaWeights, max_model_len: int, backend: Backend
) -> EagleWeights:
    """CheckpointError for a tensor that is missing, misshapen or not finite, and for ids that there are no tokens of.

    `served`: whose embedding the head reads where it has none. It computes in `backend.dtype`."""
    check_head(checkpoint, config)
    with backend.reading(checkpoint) as read:
        return _load(read, config, served, max_model_len, backend)


def _load(
    checkpoint: Checkpoint, config: EagleConfig, served: LlamaWeights, max_model_len: int, backend: Backend
) -> EagleWeights:
    shapes, c, device = head_shapes(config), config.llama, backend.device

    def norm(name: str) -> RMSNorm:
        weight = checkpoint.tensor(f"{name}.weight", shapes[f"{name}.weight"])
        return RMSNorm(weight.to(device), c.rms_norm_eps)

    def linear(*names: str) -> Linear:
        """Side by side."""
        parts = [(checkpoint.tensor(f"{n}.weight", shapes[f"{n}.weight"]), checkpoint.bias(n)) for n in names]
        for name, (weight, bias) in zip(names, parts, strict=True):
            if bias is not None and bias.shape != weight.shape[:1]:
                raise CheckpointError(
                    f"{checkpoint.files[0]}: tensor {name}.bias is {tuple(bias.shape)} beside a weight of "
                    f"{tuple(weight.shape)}; download the checkpoint again"
                )
        return backend.dense(*merge_dense(parts))

    embedding = served.embedding
    if _EMBEDDING in checkpoint.store:
        embedding = checkpoint.tensor(_EMBEDDING, (c.vocab_size, c.hidden_size))
        embedding = embedding.to(device=device, dtype=backend.embedding_dtype(embedding.dtype, False))
    layer = LayerWeights(
        input_norm=norm(f"{_LAYER}input_layernorm"),
        qkv=linear(*(f"{_LAYER}self_attn.{part}_proj" for part in "qkv")),
        head_norm=None,
        window=None,
        o=linear(f"{_LAYER}self_attn.o_proj"),
        post_attention_norm=norm(f"{_LAYER}post_attention_layernorm"),
        gate_up=linear(f"{_LAYER}mlp.gate_proj", f"{_LAYER}mlp.up_proj"),
        down=linear(f"{_LAYER}mlp.down_proj"),
    )
    llama = LlamaWeights(
        config=c,
        embedding=embedding,
        layers=[layer],
        norm=norm("norm"),
        lm_head=backend.head(checkpoint.tensor("lm_head.weight", shapes["lm_head.weight"])),
        rotary=Rotary(c.rope, c.head_dim, max_model_len, device),
    )
    fc, targets = linear("fc"), _target_ids(checkpoint, config)
    borrowed = embedding.numel() * embedding.element_size() if embedding is served.embedding else 0
    return EagleWeights(
        llama=llama,
        config=config,
        feature_norm=norm(f"{_LAYER}hidden_norm"),
        fc=fc,
        target_ids=None if targets is None else targets.to(device),
        num_bytes=llama.num_bytes + fc.num_bytes - borrowed,
    )


def _target_ids(checkpoint: Checkpoint, config: EagleConfig) -> Tensor | None:
    """From d2t, the token of each row less its number."""
    store, size, vocab_size = checkpoint.store, config.draft_vocab_size, config.llama.vocab_size
    if _TARGETS not in store:
        return None
    file = store.file(_TARGETS)
    if store.shape(_TARGETS) != (size,) or store.dtype(_TARGETS) not in (torch.int64, torch.int32):
        raise CheckpointError(
            f"{file}: tensor {_TARGETS} is {store.shape(_TARGETS)} {store.dtype_name(_TARGETS)}, not a whole number "
            f"for each of {size} rows (draft_vocab_size); use the config.json of this head"
        )
    ids = torch.arange(size) + store.on_cpu(_TARGETS).long()
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise CheckpointError(
            f"{file}: by {_TARGETS} a row stands for token {int(outside[0])}, and there are {vocab_size}; download the "
            "file again, or use the config.json of this head"
        )
    if len(set(ids.tolist())) < size:
        raise CheckpointError(f"{file}: by {_TARGETS} two rows stand for one token; download the file again")
    return ids
