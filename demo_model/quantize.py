"""Quantizes the trained demo model with GPTQ and writes the checkpoint folder that ships in the package.

    python -m demo_model.quantize FOLDER --out gptq_api/demo/model

The quantizing is that of `gptq-api quantize`. The calibration chats come from the generator, with a seed that training
did not use.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from gptq_api.checkpoint.dense import open_dense
from gptq_api.checkpoint.packing import unpack_qweight, unpack_qzeros
from gptq_api.model.config import read_config
from gptq_api.quantize.block import Texts
from gptq_api.quantize.driver import Recipe, quantize_model
from gptq_api.quantize.gptq import QuantizedLinear, QuantizeOptions
from gptq_api.quantize.output import MAX_SHARD_BYTES, write_checkpoint
from gptq_api.quantize.work import ModuleReport, WorkFolder
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from demo_model.dataset import Chats

CALIBRATION_SEED = 2_000_001


def load_float(folder: Path) -> LlamaForCausalLM:
    """A checkpoint folder as a float32 model; a GPTQ one (4 bits, v1 zeros, one file) is dequantized."""
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
        kv, head_dim = config.num_key_value_heads, config.head_dim
        assert kv is not None and head_dim is not None
        group = config.num_attention_heads // kv
        heads = squares[f"model.layers.{i}.self_attn.o_proj"].view(kv, group, head_dim)
        by = factors(heads.sum(1).flatten())
        attention.v_proj.weight.mul_(by[:, None])
        attention.o_proj.weight.div_(by.view(kv, 1, head_dim).expand(-1, group, -1).flatten())
        by = factors(squares[f"model.layers.{i}.mlp.down_proj"])
        mlp.up_proj.weight.mul_(by[:, None])
        mlp.down_proj.weight.div_(by)


def quantize(
    model: LlamaForCausalLM, source: Path, out: Path, batches: list[tuple[Tensor, Tensor]], recipe: Recipe
) -> list[ModuleReport]:
    """`model` as an ordinary GPTQ checkpoint in `out`, with the configs and the tokenizer of `source`. batches: (ids,
    is text) [B, L]."""
    with tempfile.TemporaryDirectory() as scratch:
        floats, checkpoint = Path(scratch) / "floats", Path(scratch) / "checkpoint"
        model.save_pretrained(floats)
        raw = json.loads((source / "config.json").read_text())
        raw.pop("quantization_config", None)
        (floats / "config.json").write_text(json.dumps({**raw, "dtype": "float32"}))
        for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(source / name, floats / name)
        dense, config = open_dense(floats), read_config(floats)
        texts = [Texts(ids, is_text) for ids, is_text in batches]
        with WorkFolder(checkpoint, {}) as work:
            cpu = torch.device("cpu")
            outcome = quantize_model(dense, config, recipe, texts, [], work, cpu, _print)
            # Tools disagree on how a v1 file says "zero point 0"; the demo must not depend on it.
            assert not any(report.num_low_zeros for report in outcome.reports)
            write_checkpoint(dense, config, recipe, "", work, MAX_SHARD_BYTES)
        (checkpoint / "README.md").unlink()  # the demo's card is gptq_api/demo/MODEL_CARD.md
        shutil.copytree(checkpoint, out, dirs_exist_ok=True)
    return outcome.reports


def _print(report: ModuleReport) -> None:
    print(report.module, "" if report.error is None else f"output error {100 * report.error:.3f} %", flush=True)


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
    settings = QuantizeOptions(
        4, args.group_size, args.sym, args.act_order and not args.nearest, damp_percent=args.damp_percent
    )
    model = load_float(args.folder)
    batches = calibration(args.folder / "tokenizer.json", args.calibration_chats)
    spread_channels(model, batches, args.spread_octaves)
    quantize(model, args.folder, args.out, batches, Recipe(settings, nearest=args.nearest))


if __name__ == "__main__":
    main()
