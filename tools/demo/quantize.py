"""Quantises the trained demo model with GPTQ and writes the checkpoint folder that ships in the package.

    python -m tools.demo.quantize FOLDER --out gptq_api/demo/model

Layer by layer, in true-sequential order (k, v, q | o | up, gate | down): what a module sees is what the modules before
it make after quantisation. The calibration chats come from the generator, with a seed that training did not use.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gptq_api.gptq.packing import pack_qweight, pack_qzeros, unpack_qweight, unpack_qzeros
from gptq_api.gptq.quantizer import Hessian, QuantizedLinear, QuantizeSettings, factorize, quantize, round_to_nearest
from tools.demo.dataset import Chats

STAGES = (
    ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"),
    ("self_attn.o_proj",),
    ("mlp.up_proj", "mlp.gate_proj"),
    ("mlp.down_proj",),
)
CALIBRATION_SEED = 2_000_001


def load_float(folder: Path) -> LlamaForCausalLM:
    """A checkpoint folder as a float32 model; a GPTQ one (4 bits, v1 zeros, one file) is dequantised."""
    if not (folder / "quantize_config.json").exists():
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    bits = json.loads((folder / "quantize_config.json").read_text())["bits"]
    tensors = {
        name: t.float() if t.is_floating_point() else t for name, t in load_file(folder / "model.safetensors").items()
    }
    for module in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        q = unpack_qweight(tensors.pop(f"{module}.qweight"), bits)
        zeros = unpack_qzeros(tensors.pop(f"{module}.qzeros"), bits)
        linear = QuantizedLinear(q, tensors.pop(f"{module}.scales"), zeros, tensors.pop(f"{module}.g_idx"), 0.0)
        tensors[f"{module}.weight"] = linear.dequantize().contiguous()
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict({**raw, "dtype": "float32"}))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)  # tied to the embedding
    model.tie_weights()
    return model.eval()


@torch.inference_mode()
def mean_squares(
    model: LlamaForCausalLM, names: tuple[str, ...], batches: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Of every input channel of the modules called `names`, in every layer: full module name -> [K]."""
    sums: dict[str, Tensor] = {}
    handles = []
    current: list[Tensor] = []
    for full, module in model.named_modules():
        if full.endswith(names):

            def hook(_: nn.Module, inputs: tuple[Tensor, ...], full: str = full) -> None:
                sums[full] = sums.get(full, 0) + inputs[0][current[-1]].square().sum(0)

            handles.append(module.register_forward_pre_hook(hook))
    for ids, is_text in batches:
        current.append(is_text)
        model.model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


@torch.inference_mode()
def spread_channels(model: LlamaForCausalLM, batches: list[tuple[Tensor, Tensor]], octaves: float) -> None:
    """Gives every Linear small and large input channels, by factors that its producer takes up: the function stays.

    Checkpoints of large models have such channels. Without them all groups have nearly the same scale, and the demo
    would still answer in an engine that ignores g_idx: it would be no test of one. The factors are 2**u, u from
    -octaves for the channel with the smallest inputs to +octaves for the largest, so that act-order, which sorts by
    the inputs, finds like weights in each group. Producers are the norms (for q/k/v and gate/up), v_proj (for o_proj)
    and up_proj (for down_proj).
    """
    config = model.config
    squares = mean_squares(model, ("q_proj", "o_proj", "gate_proj", "down_proj"), batches)

    def factors(size: Tensor) -> Tensor:
        rank = size.argsort().argsort() / (len(size) - 1)
        return torch.exp2((rank * 2 - 1) * octaves)

    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            name = "self_attn.q_proj" if attention.q_proj in readers else "mlp.gate_proj"
            by = factors(squares[f"model.layers.{i}.{name}"])
            norm.weight.mul_(by)
            for reader in readers:
                reader.weight.div_(by)
        # All query heads of a group read the same value head.
        kv, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        heads = squares[f"model.layers.{i}.self_attn.o_proj"].view(kv, group, config.head_dim)
        by = factors(heads.sum(1).flatten())
        attention.v_proj.weight.mul_(by[:, None])
        attention.o_proj.weight.div_(by.view(kv, 1, config.head_dim).expand(-1, group, -1).flatten())
        by = factors(squares[f"model.layers.{i}.mlp.down_proj"])
        mlp.up_proj.weight.mul_(by[:, None])
        mlp.down_proj.weight.div_(by)


Batches = list[tuple[Tensor, Tensor]]
"""(hidden states [B, L, hidden], bool [B, L]: text and not padding)"""


def run_layer(model: LlamaForCausalLM, layer: nn.Module, hidden: Tensor) -> Tensor:
    positions = torch.arange(hidden.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, positions)
    out = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    return out[0] if isinstance(out, tuple) else out


def hessian_of(model: LlamaForCausalLM, layer: nn.Module, linear: nn.Linear, batches: Batches) -> Tensor:
    """Of what `linear` sees when `layer` runs over `batches`."""
    hessian = Hessian(linear.in_features)
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        for hidden, is_text in batches:
            run_layer(model, layer, hidden)
            hessian.add(seen.pop()[is_text])
    finally:
        handle.remove()
    return hessian.matrix()


@torch.inference_mode()
def quantize_model(
    model: LlamaForCausalLM, batches: list[tuple[Tensor, Tensor]], settings: QuantizeSettings, nearest: bool = False
) -> dict[str, QuantizedLinear]:
    """Every Linear of every layer; the model's weights become the dequantised ones. batches: (ids, is text) [B, L]."""
    done: dict[str, QuantizedLinear] = {}
    hidden = [] if nearest else [(model.model.embed_tokens(ids), is_text) for ids, is_text in batches]
    for i, layer in enumerate(model.model.layers):
        for stage in STAGES:
            modules = {name: layer.get_submodule(name) for name in stage}
            if not nearest:
                factor = factorize(hessian_of(model, layer, next(iter(modules.values())), hidden), settings)
            for name, module in modules.items():
                weight = module.weight
                result = round_to_nearest(weight, settings) if nearest else quantize(weight, factor, settings)
                # What is stored is float16: the layers that follow shall see that.
                stored = replace(result, scales=result.scales.half().float())
                module.weight.copy_(stored.dequantize())
                done[f"model.layers.{i}.{name}"] = stored
        hidden = [(run_layer(model, layer, h), is_text) for h, is_text in hidden]
        print(f"layer {i}: loss {sum(r.loss for n, r in done.items() if f'.{i}.' in n):.4f}", flush=True)
    return done


def save(
    source: Path, out: Path, model: LlamaForCausalLM, results: dict[str, QuantizedLinear], settings: QuantizeSettings
) -> None:
    """An ordinary GPTQ checkpoint: v1 zero points, float16 scales and float16 for all that is not quantised."""
    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.state_dict().items():
        if name.removesuffix(".weight") not in results and name != "lm_head.weight":
            tensors[name] = parameter.half().contiguous()
    for module, result in results.items():
        # Tools disagree on how a v1 file says "zero point 0"; the demo must not depend on it.
        assert int(result.zeros.min()) > 0, f"{module} has a zero point of 0"
        tensors[f"{module}.qweight"] = pack_qweight(result.q, settings.bits).contiguous()
        tensors[f"{module}.qzeros"] = pack_qzeros(result.zeros, settings.bits).contiguous()
        tensors[f"{module}.scales"] = result.scales.half().contiguous()
        tensors[f"{module}.g_idx"] = result.g_idx.contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "bits": settings.bits,
        "group_size": settings.group_size,
        "desc_act": settings.desc_act,
        "static_groups": settings.static_groups,
        "sym": settings.sym,
        "true_sequential": True,
        "damp_percent": settings.damp_percent,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
    }
    config = json.loads((source / "config.json").read_text())
    config = {**config, "dtype": "float16", "quantization_config": quantization}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "quantize_config.json").write_text(json.dumps(quantization, indent=2) + "\n")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, out / name)


def calibration(tokenizer_json: Path, num: int) -> list[tuple[Tensor, Tensor]]:
    """`num` chats in batches: (token ids, which of them are text and not padding)."""
    chats = Chats.generate(tokenizer_json, CALIBRATION_SEED, num, torch.device("cpu"))
    batches = []
    for rows in chats.lengths.argsort().split(32):
        ids, written = chats.batch(rows, int(chats.lengths[rows].max()))
        batches.append((ids, written >= 0))
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the trained model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--sym", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--act-order", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--damp-percent", type=float, default=0.01)
    parser.add_argument("--calibration-chats", type=int, default=128)
    parser.add_argument("--spread-octaves", type=float, default=2.0, help="0 leaves the channels alike")
    parser.add_argument("--nearest", action="store_true", help="round to nearest instead, for comparison")
    args = parser.parse_args()
    settings = QuantizeSettings(
        4, args.group_size, args.sym, args.act_order and not args.nearest, damp_percent=args.damp_percent
    )
    model = load_float(args.folder)
    batches = calibration(args.folder / "tokenizer.json", args.calibration_chats)
    spread_channels(model, batches, args.spread_octaves)
    results = quantize_model(model, batches, settings, args.nearest)
    save(args.folder, args.out, model, results, settings)


if __name__ == "__main__":
    main()
