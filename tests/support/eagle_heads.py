"""Random EAGLE-3 heads in their published layout, and what such a head computes: plain torch, float32, one text."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gptq_api.runner.cpu import native
from tests.support.checkpoints import Recipe

needs_taps = pytest.mark.skipif(
    native.is_available() and not hasattr(native.module().Model, "set_taps"), reason="_cpu is of an older build"
)


@dataclass(frozen=True)
class HeadRecipe:
    """For a served model of this recipe."""

    served: Recipe
    seed: int = 0
    draft_vocab_size: int = 64
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    intermediate_size: int = 96
    hidden_size: int | None = None
    """None: the served model's; another one needs an embedding of its own"""
    has_embedding: bool = False
    norm_before_residual: bool = False
    num_taps: int = 3
    float_dtype: torch.dtype = torch.float16
    more_config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RandomHead:
    recipe: HeadRecipe
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def target_ids(self) -> Tensor:
        """int64 [draft_vocab_size]"""
        return torch.arange(self.recipe.draft_vocab_size) + self.tensors["d2t"]

    def guesses(self, embedding: Tensor, tapped: Tensor, tokens: list[int], num: int) -> tuple[Tensor, list[int]]:
        """`embedding` float32 [V, H]; `tapped` float32 [len(tokens) - 1, taps * H]: of the served model, for all tokens
        but the last. Returns (float32 logits [num, draft_vocab_size] behind them, the likeliest token of each)."""
        tensors = {name: tensor.float() for name, tensor in self.tensors.items()}
        embedding = tensors.get("embed_tokens.weight", embedding)
        hidden = list(tapped @ tensors["fc.weight"].t())
        text, rows = list(tokens), list[Tensor]()
        for _ in range(num):
            out = self._layer(torch.stack(hidden), embedding[text[1:]], tensors)[-1]
            rows.append(_norm(out, tensors["norm.weight"]) @ tensors["lm_head.weight"].t())
            text.append(int(self.target_ids[rows[-1].argmax()]))
            hidden.append(out)
        return torch.stack(rows), text[len(tokens) :]

    def _layer(self, x: Tensor, embedded: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        r = self.recipe

        def w(name: str) -> Tensor:
            return tensors[f"midlayer.{name}.weight"]

        normed = _norm(x, w("hidden_norm"))
        both = torch.cat((_norm(embedded, w("input_layernorm")), normed), -1)
        if r.norm_before_residual:
            x = normed
        q, k, v = (
            (both @ w(f"self_attn.{part}_proj").t()).view(len(x), -1, r.head_dim).transpose(0, 1) for part in "qkv"
        )
        q, k = _rotated(q), _rotated(k)
        share = r.num_heads // r.num_kv_heads
        k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
        scores = q @ k.transpose(1, 2) * r.head_dim**-0.5
        seen = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        attended = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        x = x + attended.transpose(0, 1).reshape(len(x), -1) @ w("self_attn.o_proj").t()
        y = _norm(x, w("post_attention_layernorm"))
        gate, up = y @ w("mlp.gate_proj").t(), y @ w("mlp.up_proj").t()
        return x + (torch.nn.functional.silu(gate) * up) @ w("mlp.down_proj").t()


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def _rotated(x: Tensor) -> Tensor:
    """[heads, T, D], theta 10,000."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1]).unsqueeze(1) * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()
    low, high = x[..., :half], x[..., half:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def random_head(recipe: HeadRecipe) -> RandomHead:
    r, generator = recipe, torch.Generator().manual_seed(100 + recipe.seed)
    hidden, target = r.hidden_size or r.served.hidden_size, r.served.hidden_size
    heads, kv, ffn = r.num_heads * r.head_dim, r.num_kv_heads * r.head_dim, r.intermediate_size

    def normal(*shape: int, std: float | None = None) -> Tensor:
        std = 0.8 / shape[-1] ** 0.5 if std is None else std
        return (torch.randn(*shape, generator=generator) * std).to(r.float_dtype)

    def norm() -> Tensor:
        return 1 + normal(hidden, std=0.1)

    tensors = {
        "fc.weight": normal(hidden, r.num_taps * target),
        "midlayer.input_layernorm.weight": norm(),
        "midlayer.hidden_norm.weight": norm(),
        "midlayer.post_attention_layernorm.weight": norm(),
        "midlayer.self_attn.q_proj.weight": normal(heads, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": normal(kv, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": normal(kv, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": normal(hidden, heads),
        "midlayer.mlp.gate_proj.weight": normal(ffn, hidden),
        "midlayer.mlp.up_proj.weight": normal(ffn, hidden),
        "midlayer.mlp.down_proj.weight": normal(hidden, ffn),
        "norm.weight": norm(),
        "lm_head.weight": normal(r.draft_vocab_size, hidden, std=0.3),
    }
    if r.has_embedding:
        tensors["embed_tokens.weight"] = normal(r.served.vocab_size, hidden, std=0.5)
    chosen = torch.randperm(r.served.vocab_size, generator=generator)[: r.draft_vocab_size].sort().values
    tensors["d2t"] = chosen - torch.arange(r.draft_vocab_size)
    tensors["t2d"] = torch.zeros(r.served.vocab_size, dtype=torch.bool).index_fill_(0, chosen, True)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": 1,
        "num_attention_heads": r.num_heads,
        "num_key_value_heads": r.num_kv_heads,
        "head_dim": r.head_dim,
        "max_position_embeddings": r.served.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "vocab_size": r.served.vocab_size,
        "draft_vocab_size": r.draft_vocab_size,
    }
    if hidden != target:
        config["target_hidden_size"] = target
    if r.norm_before_residual:
        config["norm_before_residual"] = True
    return RandomHead(r, config | r.more_config, tensors)


def write_head(folder: Path, head: RandomHead, *, pickled: bool = False, **config: Any) -> Path:
    """`config`: other values of config.json; None leaves the key out."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in {**head.config, **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    if pickled:
        torch.save(head.tensors, folder / "pytorch_model.bin")
    else:
        save_file(head.tensors, folder / "model.safetensors")
    return folder
