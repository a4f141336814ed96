"""demo_model/quantize.py on a tiny random model: what it writes is what it computed, and our reader reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from demo_model.quantize import load_float, quantize, spread_channels
from gptq_api.checkpoint.checkpoint import open_checkpoint
from gptq_api.checkpoint.dense import dequantized
from gptq_api.checkpoint.summary import summarise
from gptq_api.quantize.driver import Recipe
from gptq_api.quantize.gptq import QuantizeOptions
from transformers import LlamaConfig, LlamaForCausalLM

Batches = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).float().eval()


@pytest.fixture
def batches() -> Batches:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (4, 16, 40), generator=generator)
    is_text = torch.ones(16, 40, dtype=torch.bool)
    is_text[:, 30:] = False
    return [(part, is_text) for part in ids]


@torch.inference_mode()
def test_spreading_channels_keeps_the_function(model: LlamaForCausalLM, batches: Batches) -> None:
    ids = batches[0][0]
    before = model(ids).logits
    weight = model.model.layers[0].mlp.down_proj.weight.clone()
    spread_channels(model, batches, octaves=2.0)
    changed = (model.model.layers[0].mlp.down_proj.weight / weight).mean(0)
    assert changed.min() < 0.3 and changed.max() > 3
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sym", [True, False])
def test_what_is_written_is_what_was_computed(
    model: LlamaForCausalLM, batches: Batches, tmp_path: Path, sym: bool
) -> None:
    source, out = tmp_path / "trained", tmp_path / "quantized"
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_text("{}")
    reports = quantize(model, source, out, batches, Recipe(QuantizeOptions(4, 32, sym, desc_act=True)))
    assert len(reports) == 14 and all(report.error is not None and 0 < report.error < 0.02 for report in reports)

    checkpoint = open_checkpoint(out)
    q, k = (checkpoint.gptq(f"model.layers.1.self_attn.{part}_proj") for part in "qk")
    assert torch.equal(q.g_idx, k.g_idx) and not torch.equal(q.g_idx, q.g_idx.sort().values)
    summary = summarise(checkpoint)
    assert (summary.num_modules, summary.num_act_order, summary.num_sym) == (14, 14, 14 if sym else 0)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["sym"] is sym
    again = load_float(out).state_dict()
    dense = dequantized(checkpoint)
    for name, weight in model.state_dict().items():
        if name.removesuffix(".weight") in checkpoint.modules:
            assert torch.equal(again[name], dense.tensor(name, tuple(weight.shape))), name
            assert (again[name] - weight).norm() < 0.2 * weight.norm()
        else:
            torch.testing.assert_close(again[name], weight, rtol=1e-3, atol=1e-4)
