"""Small random LLaMA checkpoints in any layout, and the same model in transformers built from the dequantized
weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gptq_api.checkpoint.packing import ZeroVersion, pack_qweight, pack_qzeros, values_per_unit


@dataclass(frozen=True)
class Recipe:
    """What the random model is and how it is quantized."""

    seed: int = 0
    family: str = "llama"
    """model_type"""
    more_config: dict[str, Any] = field(default_factory=dict)
    """keys of config.json that only this family has"""
    vocab_size: int = 96
    hidden_size: int = 64
    intermediate_size: int = 160
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None
    max_position_embeddings: int = 256
    tie: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: dict[str, Any] | None = None
    """rope_parameters, in the dialect of transformers 5"""
    bits: int = 4
    group_size: int = 32
    act_order: bool = False
    sym: bool = True
    quantize_head: bool = False
    dense: tuple[str, ...] = ()
    """module name endings that stay unquantized"""
    mixed_bits: dict[str, int] = field(default_factory=dict)
    """module name ending -> bits"""
    float_dtype: torch.dtype = torch.float16
    """of what is not quantized; scales are float16"""
    own_order: tuple[str, ...] = ()
    """module name endings whose act-order differs from that of their neighbours with the same input"""


@dataclass(frozen=True)
class QuantizedModule:
    q: Tensor
    zeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bits: int

    def dequantized(self) -> Tensor:
        """float32 [N, K]"""
        g = self.g_idx.long()
        return ((self.q.float() - self.zeros[g].float()) * self.scales[g].float()).t().contiguous()


@dataclass(frozen=True)
class RandomModel:
    recipe: Recipe
    config: dict[str, Any]
    modules: dict[str, QuantizedModule]
    dense: dict[str, Tensor]
    """every unquantized tensor by its name, biases included"""

    def reference(self) -> Any:
        """transformers' model of the family in float32 with the dequantized weights."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(self.recipe.family, **self.config)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        state = {name: tensor.to(self.recipe.float_dtype).float() for name, tensor in self.dense.items()}
        state |= {f"{name}.weight": module.dequantized() for name, module in self.modules.items()}
        if self.recipe.tie:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state, strict=True)
        return model.eval()

    def reference_logits(self, token_ids: list[int]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.reference()(torch.tensor([token_ids])).logits[0]
            return logits

    def tensors(self, zero_version: ZeroVersion = 1, g_idx: str = "keep") -> dict[str, Tensor]:
        """The state dict of a checkpoint. g_idx: keep, omit, or zeros (as some tools of 2023 wrote)."""
        state = {name: tensor.to(self.recipe.float_dtype) for name, tensor in self.dense.items()}
        for name, m in self.modules.items():
            state[f"{name}.qweight"] = pack_qweight(m.q, m.bits)
            state[f"{name}.qzeros"] = pack_qzeros(m.zeros, m.bits, zero_version)
            state[f"{name}.scales"] = m.scales.clone()
            if g_idx != "omit":
                state[f"{name}.g_idx"] = m.g_idx.clone() if g_idx == "keep" else torch.zeros_like(m.g_idx)
        return state


def random_model(recipe: Recipe) -> RandomModel:
    """Weights large enough that logits differ clearly between tokens, quantized by rounding to nearest."""
    r = recipe
    generator = torch.Generator().manual_seed(r.seed)
    head_dim = r.head_dim or r.hidden_size // r.num_heads
    heads, kv = r.num_heads * head_dim, r.num_kv_heads * head_dim
    qkv_bias = r.attention_bias or r.family == "qwen2"

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).half().float()

    dense: dict[str, Tensor] = {"model.embed_tokens.weight": normal(r.vocab_size, r.hidden_size, std=0.5)}
    dense["model.norm.weight"] = 1 + normal(r.hidden_size, std=0.1)
    if not r.tie:
        dense["lm_head.weight"] = normal(r.vocab_size, r.hidden_size, std=0.3)
    linears: dict[str, tuple[int, int, bool, int]] = {}
    for i in range(r.num_layers):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            dense[f"{layer}.{norm}.weight"] = 1 + normal(r.hidden_size, std=0.1)
        fused = r.family == "phi3"
        attention = (("qkv", heads + 2 * kv),) if fused else (("q", heads), ("k", kv), ("v", kv))
        for part, n in attention:
            linears[f"{layer}.self_attn.{part}_proj"] = (r.hidden_size, n, qkv_bias, 10 * i)
        linears[f"{layer}.self_attn.o_proj"] = (heads, r.hidden_size, r.attention_bias, 10 * i + 1)
        if r.family == "qwen3":
            for part in "qk":
                dense[f"{layer}.self_attn.{part}_norm.weight"] = 1 + normal(head_dim, std=0.3)
        inner = r.intermediate_size
        ffn = (("gate_up", 2 * inner),) if fused else (("gate", inner), ("up", inner))
        for part, n in ffn:
            linears[f"{layer}.mlp.{part}_proj"] = (r.hidden_size, n, r.mlp_bias, 10 * i + 2)
        linears[f"{layer}.mlp.down_proj"] = (r.intermediate_size, r.hidden_size, r.mlp_bias, 10 * i + 3)
    if r.quantize_head:
        dense.pop("lm_head.weight")
        linears["lm_head"] = (r.hidden_size, r.vocab_size, False, 9999)
    modules: dict[str, QuantizedModule] = {}
    for name, (k, n, bias, order) in linears.items():
        weight = normal(n, k, std=0.8 / k**0.5)
        if bias:
            dense[f"{name}.bias"] = normal(n, std=0.2)
        if name.endswith(r.dense) and r.dense:
            dense[f"{name}.weight"] = weight
            continue
        bits = next((b for ending, b in r.mixed_bits.items() if name.endswith(ending)), r.bits)
        order += 5 if r.own_order and name.endswith(r.own_order) else 0
        modules[name] = round_to_nearest(weight, bits, r.group_size, r.sym, r.act_order, order)
    return RandomModel(r, _config(r, head_dim), modules, dense)


def round_to_nearest(
    weight: Tensor, bits: int, group_size: int, sym: bool, act_order: bool, order_seed: int = 0
) -> QuantizedModule:
    """float32 [N, K] in groups of group_size inputs (-1: one), the last one possibly partial."""
    n, k = weight.shape
    assert k % values_per_unit(bits) == 0 and n % values_per_unit(bits) == 0
    size = k if group_size < 0 else group_size
    g_idx = torch.arange(k, dtype=torch.int32) // size
    if act_order:
        g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(order_seed))]
    top = 2**bits - 1
    num_groups = -(-k // size)
    scales = torch.empty(num_groups, n)
    zeros = torch.empty(num_groups, n)
    for g in range(num_groups):
        part = weight[:, g_idx == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if sym:
            high = torch.maximum(low.abs(), high)
            low = -high
        scales[g] = ((high - low) / top).clamp(min=1e-5)
        zeros[g] = 2 ** (bits - 1) if sym else (-low / scales[g]).round().clamp(0, top)
    scales = scales.half()
    group = g_idx.long()
    q = (weight.t() / scales.float()[group] + zeros[group]).round().clamp(0, top)
    return QuantizedModule(q.to(torch.uint8), zeros.to(torch.uint8), scales, g_idx, bits)


def _config(r: Recipe, head_dim: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "vocab_size": r.vocab_size,
        "hidden_size": r.hidden_size,
        "intermediate_size": r.intermediate_size,
        "num_hidden_layers": r.num_layers,
        "num_attention_heads": r.num_heads,
        "num_key_value_heads": r.num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": r.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": r.tie,
        "attention_bias": r.attention_bias,
        "mlp_bias": r.mlp_bias,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config |= r.more_config
    if r.rope is not None:
        config["rope_parameters"] = {"rope_theta": 10000.0, **r.rope}
    return config


def write_checkpoint(
    folder: Path,
    model: RandomModel,
    *,
    container: str = "safetensors",
    zero_version: ZeroVersion = 1,
    g_idx: str = "keep",
    quant_config: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """Write a folder. container: safetensors, sharded (with index, modules split), or pt; `config` overrides
    config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.tensors(zero_version, g_idx) if tensors is None else tensors
    family = model.recipe.family
    base = {"architectures": [f"{family.title()}ForCausalLM"], "model_type": family, "torch_dtype": "float16"}
    text = json.dumps({k: v for k, v in {**base, **model.config, **config}.items() if v is not None})
    (folder / "config.json").write_text(text)
    if quant_config is not None:
        (folder / "quantize_config.json").write_text(json.dumps(quant_config))
    if container == "pt":
        torch.save(state, folder / "llama-4bit-32g.pt")
    elif container == "sharded":
        names = sorted(state)
        files = [f"model-{i + 1:05d}-of-00003.safetensors" for i in range(3)]
        # Dealt out like cards: the parts of every module end up in different shards.
        placed = {name: files[i % 3] for i, name in enumerate(names)}
        for file in files:
            save_file({n: state[n].contiguous() for n in names if placed[n] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    else:
        save_file(
            {n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors", metadata={"format": "pt"}
        )
    return folder


DEMO_SIZE = replace(
    Recipe(),
    vocab_size=2048,
    hidden_size=384,
    intermediate_size=1024,
    num_layers=8,
    num_heads=6,
    num_kv_heads=2,
    max_position_embeddings=1024,
    act_order=True,
)
"""About the size of the model in the package."""
