"""Every published GPTQ layout, written from one set of weights by what is known of its writer (file and tensor names,
types, shapes, side files). `LAYOUTS` is the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gptq_api.checkpoint.packing import ZeroVersion, pack_qweight, pack_qzeros
from tests.support.checkpoints import QuantizedModule, RandomModel, Recipe, write_checkpoint

State = dict[str, Tensor]
Write = Callable[[Path, RandomModel], None]


@dataclass(frozen=True)
class Layout:
    recipe: Recipe
    write: Write
    versions: dict[str, int] | None = None
    """zero version -> modules, where it is not v1 alone"""
    warns: tuple[str, ...] = field(default=())
    """words of the warnings there must be, one each"""


BASE = Recipe()
SQUARE = Recipe(hidden_size=256, intermediate_size=512, num_kv_heads=4, num_layers=1)
"""the writers of March 2023 took multiples of 256"""
BITS_4: dict[str, Any] = {
    "bits": 4,
    "group_size": 32,
    "damp_percent": 0.01,
    "desc_act": False,
    "sym": True,
    "true_sequential": True,
}
LLAMA1_CONFIG = {
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": -1,
    "max_sequence_length": 256,
    "num_key_value_heads": None,
    "head_dim": None,
    "attention_bias": None,
    "mlp_bias": None,
}


def folder_of(
    path: Path, model: RandomModel, state: State, file: str = "model.safetensors", metadata: Any = None, **config: Any
) -> None:
    """config.json and one weights file of any name."""
    write_checkpoint(path, model, tensors=state, **config)
    (path / "model.safetensors").unlink()
    if file.endswith(".safetensors"):
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, path / file, metadata=metadata or {"format": "pt"})
    else:
        torch.save(state, path / file)


def _json(path: Path, name: str, value: dict[str, Any]) -> None:
    (path / name).write_text(json.dumps(value))


def before_2023_03_20(path: Path, model: RandomModel) -> None:
    """One row of scales and zero * scale per output, float32; a bias everywhere; no qzeros, no g_idx."""

    def module(m: QuantizedModule) -> State:
        scales = m.scales.float().t().contiguous()
        return {
            "qweight": pack_qweight(m.q, m.bits),
            "scales": scales,
            "zeros": m.zeros.float().t() * scales,
            "bias": torch.zeros(scales.shape[0]),
        }

    assert all(size % 256 == 0 for m in model.modules.values() for size in m.q.shape)
    folder_of(path, model, _state(model, module), "llama7b-4bit.pt", **LLAMA1_CONFIG)


def march_2023(path: Path, model: RandomModel) -> None:
    """2023-03-20 .. 30: qzeros as wide as N // 256 * bits * 8, float32 scales, a bias everywhere, no g_idx."""

    def module(m: QuantizedModule) -> State:
        qzeros = pack_qzeros(m.zeros, m.bits, 1)
        assert qzeros.shape[1] == m.q.shape[1] // 256 * m.bits * 8
        return {
            "qweight": pack_qweight(m.q, m.bits),
            "qzeros": qzeros,
            "scales": m.scales.float(),
            "bias": torch.zeros(m.q.shape[1]),
        }

    folder_of(path, model, _state(model, module), "llama13b-4bit-128g.pt", **LLAMA1_CONFIG)


def gptq_for_llama(file: str, **config: Any) -> Write:
    """2023-03-31 and later: the tensors of today, rotary buffers, no word about the quantization."""

    def write(path: Path, model: RandomModel) -> None:
        state = model.tensors()
        for i in range(model.recipe.num_layers):
            state[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(8, dtype=torch.float16)
        folder_of(path, model, state, file, **config)

    return write


def auto_gptq(file: str, quant_name: str = "quantize_config.json", zero_bias: bool = True, **quant: Any) -> Write:
    """Zero biases from 2023-05-24 to 2024-03-25, metadata of strings."""

    def write(path: Path, model: RandomModel) -> None:
        state = model.tensors()
        if zero_bias:
            for name, m in model.modules.items():
                state[f"{name}.bias"] = torch.zeros(m.q.shape[1], dtype=torch.float16)
        metadata = {"format": "pt", "gptq_bits": "4", "gptq_group_size": "32", "gptq_desc_act": "True"}
        folder_of(path, model, state, file, metadata)
        if quant:
            _json(path, quant_name, quant)

    return write


def optimum(container: str, **quant: Any) -> Write:
    """All in config.json; `container` sharded deals the parts of every module to different files."""

    def write(path: Path, model: RandomModel) -> None:
        more = {
            "quant_method": "gptq",
            "use_cuda_fp16": False,
            "model_seqlen": None,
            "dataset": "c4",
            "tokenizer": None,
            "block_name_to_quantize": "model.layers",
            "module_name_preceding_first_block": ["model.embed_tokens"],
            "batch_size": 1,
            "pad_token_id": None,
            "use_exllama": True,
            "exllama_config": {"version": 1},
        }
        write_checkpoint(path, model, container=container, quantization_config=BITS_4 | more | quant)

    return write


def gptqmodel(version: ZeroVersion = 1, **quant: Any) -> Write:
    """quantize_config.json and its copy in config.json, in the dialect of transformers 5."""

    def write(path: Path, model: RandomModel) -> None:
        form = {1: "gptq", 2: "gptq_v2"}[version]
        full = {
            "bits": 4,
            "group_size": 32,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "pack_dtype": "int32",
            "method": "gptq",
            "quant_method": "gptq",
            "format": form,
            "checkpoint_format": form,
            "adapter": None,
            "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05, "act_group_aware": True},
            **quant,
        }
        rope: dict[str, Any] = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "rope_theta": None}
        dtypes: dict[str, Any] = {"torch_dtype": None, "dtype": "bfloat16"}
        write_checkpoint(
            path, model, zero_version=version, quantization_config=full, quant_config=full, **rope, **dtypes
        )

    return write


def tgi(path: Path, model: RandomModel) -> None:
    r = model.recipe
    scalars = {"gptq_bits": [r.bits], "gptq_groupsize": [r.group_size], "gptq_sym": [r.sym]}
    folder_of(path, model, model.tensors() | {name: torch.tensor(value) for name, value in scalars.items()})


def auto_round(version: ZeroVersion, **quant: Any) -> Write:
    def write(path: Path, model: RandomModel) -> None:
        full = {"bits": 4, "group_size": 32, "sym": model.recipe.sym, "autoround_version": "0.5.1", **quant}
        write_checkpoint(path, model, zero_version=version, quantization_config=full)

    return write


def prefixed(prefix: str) -> Write:
    def write(path: Path, model: RandomModel) -> None:
        write_checkpoint(path, model, tensors={f"{prefix}{name}": tensor for name, tensor in model.tensors().items()})

    return write


def edited(change: Callable[[State], object], **config: Any) -> Write:
    def write(path: Path, model: RandomModel) -> None:
        state = model.tensors()
        change(state)
        write_checkpoint(path, model, tensors=state, **config)

    return write


def _state(model: RandomModel, module: Callable[[QuantizedModule], State]) -> State:
    state = {name: tensor.half() for name, tensor in model.dense.items()}
    for name, m in model.modules.items():
        state |= {f"{name}.{part}": tensor for part, tensor in module(m).items()}
    return state


def _zero_g_idx(state: State) -> None:
    for name in state:
        if name.endswith(".g_idx"):
            state[name] = torch.zeros_like(state[name])


ORDERED = replace(BASE, act_order=True)
ASYM = replace(BASE, sym=False)
MIXED = replace(BASE, mixed_bits={"v_proj": 8, "down_proj": 3}, dense=("o_proj",), sym=False)
DYNAMIC = {
    "-:.*o_proj": {},
    r"+:model\.layers\.\d+\.self_attn\.v_proj": {"bits": 8},
    r".*\.down_proj": {"bits": 3},
    r".*v_proj": {"bits": 2},
}
TIED = replace(BASE, tie=True)

LAYOUTS: dict[str, Layout] = {
    **{
        f"GPTQ-for-LLaMa before 2023-03-20, {bits} bits": Layout(
            replace(SQUARE, bits=bits, sym=False, group_size=-1), before_2023_03_20, {"float": 7}
        )
        for bits in (2, 3, 4, 8)
    },
    "GPTQ-for-LLaMa before 2023-03-20, sym": Layout(replace(SQUARE, group_size=-1), before_2023_03_20, {"float": 7}),
    "GPTQ-for-LLaMa 2023-03-20..30": Layout(replace(SQUARE, group_size=128, sym=False), march_2023),
    "GPTQ-for-LLaMa 2023-03-20..30, 3 bits": Layout(replace(SQUARE, bits=3, group_size=-1, sym=False), march_2023),
    "GPTQ-for-LLaMa, safetensors": Layout(
        BASE,
        gptq_for_llama(
            "vicuna-7B-1.1-GPTQ-4bit-32g.no-act-order.safetensors", **LLAMA1_CONFIG | {"num_key_value_heads": 2}
        ),
    ),
    "GPTQ-for-LLaMa, safetensors, act-order": Layout(ORDERED, gptq_for_llama("4bit.safetensors")),
    "GPTQ-for-LLaMa, pt": Layout(ASYM, gptq_for_llama("llama7b-4bit-32g.pt")),
    "GPTQ-for-LLaMa, pt, act-order": Layout(replace(ORDERED, sym=False), gptq_for_llama("llama7b-4bit-ts-ao-32g.pt")),
    "AutoGPTQ, zero biases": Layout(
        ORDERED,
        auto_gptq("gptq_model-4bit-32g.safetensors", **BITS_4 | {"desc_act": True, "model_file_base_name": None}),
    ),
    "AutoGPTQ, bin": Layout(ASYM, auto_gptq("gptq_model-4bit-32g.bin", **BITS_4 | {"sym": False})),
    "AutoGPTQ, sym missing": Layout(
        BASE, auto_gptq("model.safetensors", zero_bias=False, bits=4, group_size=32, desc_act=False)
    ),
    "AutoGPTQ, synonyms": Layout(
        BASE, auto_gptq("model.safetensors", "quant_config.json", w_bit=4, q_group_size=32, quant_method="gptq")
    ),
    "AutoGPTQ, metadata alone": Layout(ORDERED, auto_gptq("gptq_model-4bit-32g.safetensors")),
    "static groups": Layout(BASE, auto_gptq("model.safetensors", **BITS_4 | {"desc_act": True, "static_groups": True})),
    "act-order of one group": Layout(
        replace(ORDERED, group_size=-1),
        auto_gptq("model.safetensors", **BITS_4 | {"desc_act": True, "group_size": -1}),
    ),
    "transformers": Layout(BASE, optimum("safetensors")),
    "transformers, shards": Layout(replace(ORDERED, sym=False), optimum("sharded", desc_act=True, sym=False)),
    "transformers, partly quantized blocks": Layout(
        replace(BASE, dense=("o_proj", "down_proj")),
        optimum("sharded", modules_in_block_to_quantize=[["self_attn.q_proj"], ["mlp.up_proj", "mlp.gate_proj"]]),
    ),
    "GPTQModel v1, bfloat16": Layout(replace(BASE, float_dtype=torch.bfloat16), gptqmodel()),
    "GPTQModel v1, asymmetric": Layout(ASYM, gptqmodel(sym=False)),
    "GPTQModel v2, asymmetric": Layout(replace(ASYM, float_dtype=torch.bfloat16), gptqmodel(2, sym=False), {"v2": 14}),
    "GPTQModel v2, act-order": Layout(ORDERED, gptqmodel(2, desc_act=True), {"v2": 14}),
    "GPTQModel, partial last group": Layout(replace(BASE, group_size=64), gptqmodel(group_size=64)),
    "GPTQModel, partial last group, act-order": Layout(
        replace(ORDERED, group_size=64), gptqmodel(group_size=64, desc_act=True)
    ),
    "GPTQModel, dynamic": Layout(MIXED, gptqmodel(sym=False, dynamic=DYNAMIC)),
    "GPTQModel, dynamic, v2": Layout(MIXED, gptqmodel(2, sym=False, dynamic=DYNAMIC), {"v2": 12}),
    "GPTQModel, quantized head": Layout(replace(ORDERED, quantize_head=True), gptqmodel(lm_head=True, desc_act=True)),
    **{f"{bits} bits": Layout(replace(BASE, bits=bits), gptqmodel(bits=bits)) for bits in (2, 3, 8)},
    **{
        f"{bits} bits, asymmetric, act-order, v2": Layout(
            replace(ORDERED, bits=bits, sym=False), gptqmodel(2, bits=bits, sym=False, desc_act=True), {"v2": 14}
        )
        for bits in (2, 3, 8)
    },
    "TGI": Layout(ASYM, tgi),
    "AutoRound, auto_gptq": Layout(
        BASE,
        auto_round(1, quant_method="auto-round", packing_format="auto_round:auto_gptq", data_type="int"),
    ),
    "AutoRound of 2024": Layout(
        ASYM, auto_round(1, quant_method="intel/auto-round", backend="auto_round:gptq:exllamav2")
    ),
    "AutoRound, its own packing": Layout(
        ASYM, auto_round(2, quant_method="auto-round", packing_format="auto_round"), {"v2": 14}
    ),
    "AutoRound, mixed": Layout(
        replace(BASE, mixed_bits={"0.self_attn.v_proj": 8}, dense=("1.mlp.down_proj",)),
        auto_round(
            1,
            quant_method="gptq",
            extra_config={
                "model.layers.0.self_attn.v_proj": {"bits": 8},
                "model.layers.1.mlp.down_proj": {"bits": 16, "data_type": "fp"},
            },
        ),
    ),
    "peft prefix": Layout(ORDERED, prefixed("base_model.model.")),
    "compiled prefix": Layout(ORDERED, prefixed("_orig_mod.")),
    "data-parallel prefix": Layout(ORDERED, prefixed("module._orig_mod.")),
    "g_idx of zeros": Layout(ASYM, edited(_zero_g_idx)),
    "sym, v2 tensors under a v1 config": Layout(
        BASE,
        lambda path, model: (
            write_checkpoint(path, model, zero_version=2, quant_config=BITS_4 | {"checkpoint_format": "gptq"}),
            None,
        )[-1],
        {"v2": 14},
        ("zero points are v1 but the tensors show v2",),
    ),
    "tied": Layout(TIED, edited(lambda state: None)),
    "tied, head stored as well": Layout(
        TIED, edited(lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    ),
    "tied, another head stored": Layout(
        TIED,
        edited(lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"] + 1})),
        warns=("lm_head.weight is not used",),
    ),
    "untied, the key missing": Layout(BASE, edited(lambda state: None, tie_word_embeddings=None)),
    "tied, the key missing": Layout(
        TIED, edited(lambda state: None, tie_word_embeddings=None), warns=("the embedding serves as the head",)
    ),
}
