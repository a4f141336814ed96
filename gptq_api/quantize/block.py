"""One layer of a model in float32 on plain batches, whose Linears can be replaced while calibration runs through it.

No KV cache and no kernels: every text is computed whole, so attention is one masked product. Rows beyond a text's end
are computed like the others and looked at by nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gptq_api.checkpoint.checkpoint import Checkpoint
from gptq_api.model.config import LlamaConfig
from gptq_api.model.layers.activation import silu_and_multiply
from gptq_api.model.layers.norm import HeadNorm, RMSNorm
from gptq_api.model.layers.rotary import Rotary, rotate
from gptq_api.model.modules import Joint, layer_prefix, modules, parts

STAGES: tuple[Joint, ...] = ("qkv", "o", "gate_up", "down")
"""Modules that read the same input are quantized together; these in turn."""


@dataclass(frozen=True)
class Texts:
    """Token ids of some texts, padded at the end."""

    ids: Tensor
    """int64 [B, L]"""
    is_text: Tensor
    """bool [B, L]"""


def batches(texts: list[list[int]], max_tokens: int) -> list[Texts]:
    """By length, so that little is padding; at most `max_tokens` in each (or one text)."""
    found = []
    rest = sorted(texts, key=len)
    while rest:
        num = 1
        while num < len(rest) and (num + 1) * len(rest[num]) <= max_tokens:
            num += 1
        part, rest = rest[:num], rest[num:]
        ids = torch.zeros(num, len(part[-1]), dtype=torch.int64)
        is_text = torch.zeros(ids.shape, dtype=torch.bool)
        for i, text in enumerate(part):
            ids[i, : len(text)] = torch.tensor(text)
            is_text[i, : len(text)] = True
        found.append(Texts(ids, is_text))
    return found


class Block:
    """The weights of one layer. Activations are float32 [B, L, hidden]."""

    def __init__(self, checkpoint: Checkpoint, config: LlamaConfig, index: int, device: torch.device) -> None:
        """Reads the layer. CheckpointError where a tensor is missing, misshapen or not finite."""
        self._config, self._window = config, config.windows[index]
        prefix = layer_prefix(index)
        self.weights: dict[str, Tensor] = {}
        """float32 [N, K] by module name within the layer; replaced as they are quantized"""
        self.biases: dict[str, Tensor] = {}
        for module in modules(config):
            weight = checkpoint.tensor(f"{prefix}{module.name}.weight", (module.out_features, module.in_features))
            self.weights[module.name] = weight.to(device, torch.float32)
            bias = checkpoint.bias(prefix + module.name)
            if bias is not None:
                self.biases[module.name] = bias.to(device, torch.float32)

        sizes = {"input_layernorm": config.hidden_size, "post_attention_layernorm": config.hidden_size}
        if config.family.qk_norm:
            sizes |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
        self._norm_weights = {
            name: checkpoint.tensor(f"{prefix}{name}.weight", (size,)).to(device) for name, size in sizes.items()
        }
        self._make_norms()

    def _make_norms(self) -> None:
        c, weights = self._config, self._norm_weights
        self._input_norm = RMSNorm(weights["input_layernorm"], c.rms_norm_eps)
        self._post_norm = RMSNorm(weights["post_attention_layernorm"], c.rms_norm_eps)
        self._head_norm = None
        if c.family.qk_norm:
            q, k = weights["self_attn.q_norm"], weights["self_attn.k_norm"]
            self._head_norm = HeadNorm(q, k, c.num_attention_heads, c.num_key_value_heads, c.rms_norm_eps)

    def round_rest(self, dtype: torch.dtype) -> None:
        """Norms and biases to the type they will be stored in."""
        self._norm_weights = {name: weight.to(dtype) for name, weight in self._norm_weights.items()}
        self.biases = {name: bias.to(dtype).float() for name, bias in self.biases.items()}
        self._make_norms()

    def attention_input(self, x: Tensor) -> Tensor:
        """What q, k and v read."""
        return self._input_norm.forward(x)

    def attended(self, x: Tensor, rotary: Rotary) -> Tensor:
        """What o reads: [B, L, heads * head_dim]."""
        c = self._config
        num_texts, length, _ = x.shape
        heads, kv_heads, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        normed = self.attention_input(x)
        sizes = [(heads + kv_heads) * dim, kv_heads * dim]
        qk, v = torch.split(self._linear("qkv", normed), sizes, -1)
        position = torch.arange(length, device=x.device)
        cos, sin = rotary.tables(position.repeat(num_texts))
        qk = qk.reshape(-1, heads + kv_heads, dim)
        if self._head_norm is not None:
            qk = self._head_norm.forward(qk)
        rotated = rotate(qk, cos, sin).view(num_texts, length, heads + kv_heads, dim).transpose(1, 2)
        share = heads // kv_heads
        keys = rotated[:, heads:].repeat_interleave(share, 1)
        values = v.reshape(num_texts, length, kv_heads, dim).transpose(1, 2).repeat_interleave(share, 1)
        mask = None
        if self._window is not None and self._window < length:
            ago = position[:, None] - position[None]
            mask = (ago >= 0) & (ago < self._window)
        out = functional.scaled_dot_product_attention(
            rotated[:, :heads], keys, values, attn_mask=mask, is_causal=mask is None
        )
        return out.transpose(1, 2).reshape(num_texts, length, heads * dim)

    def after_attention(self, x: Tensor, rotary: Rotary) -> Tensor:
        return x + self._linear("o", self.attended(x, rotary))

    def mlp_input(self, x: Tensor) -> Tensor:
        """What gate and up read; x is `after_attention`'s."""
        return self._post_norm.forward(x)

    def gated(self, x: Tensor) -> Tensor:
        """What down reads: [B, L, intermediate]."""
        return silu_and_multiply(self._linear("gate_up", self.mlp_input(x)))

    def after_mlp(self, x: Tensor) -> Tensor:
        return x + self._linear("down", self.gated(x))

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        return self.after_mlp(self.after_attention(x, rotary))

    def modules(self, joint: Joint) -> list[str]:
        """Names within the layer, in the table's order."""
        return [module.name for module in parts(self._config, joint)]

    def _linear(self, joint: Joint, x: Tensor) -> Tensor:
        parts = [functional.linear(x, self.weights[name], self.biases.get(name)) for name in self.modules(joint)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
