"""Every published layout loads: the tensors are exact, the logits those of transformers, the warnings those of the
table. What is told of it by `inspect` is what it is."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from gptq_api.checkpoint.checkpoint import open_checkpoint
from gptq_api.checkpoint.packing import unpack_qweight
from gptq_api.checkpoint.summary import summarise
from gptq_api.cli.inspect import inspect
from gptq_api.config import InspectSettings
from tests.model.test_agreement import all_logits, load
from tests.support.checkpoints import random_model
from tests.support.layouts import LAYOUTS

IDS = torch.randint(3, 96, (24,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_loads_and_means_the_same(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layout = LAYOUTS[name]
    model = random_model(layout.recipe)
    layout.write(tmp_path, model)

    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.modules) == set(model.modules)
    for module, source in model.modules.items():
        t = checkpoint.gptq(module)
        groups = t.g_idx.long()
        q = unpack_qweight(t.qweight, t.bits).float()
        dequantized = (q - t.zeros.float()[groups]) * t.scales.float()[groups]
        assert torch.equal(dequantized.t(), source.dequantized()), module
        assert t.bias is None or module.endswith(("q_proj", "k_proj", "v_proj"))

    summary = summarise(checkpoint)
    bits = [source.bits for source in model.modules.values()]
    assert summary.bits == {b: bits.count(b) for b in set(bits)}
    assert summary.zero_versions == (layout.versions or {"v1": len(bits)})
    assert set(summary.group_sizes) == ({-1} if layout.recipe.group_size < 0 else {layout.recipe.group_size}) | (
        {-1} if layout.recipe.group_size >= layout.recipe.hidden_size else set()
    )
    permuted = layout.recipe.act_order and layout.recipe.group_size > 0
    assert summary.num_act_order == sum(s.g_idx.unique().numel() > 1 for s in model.modules.values()) * permuted
    assert summary.num_sym == (len(bits) if layout.recipe.sym else 0)

    with caplog.at_level(logging.WARNING):
        runner = load(tmp_path)
    expected = model.reference_logits(IDS)
    assert expected.std() > 0.5
    assert (all_logits(runner, IDS) - expected).abs().max() < 1e-3
    assert len(caplog.messages) == len(layout.warns), caplog.messages
    for words, message in zip(layout.warns, caplog.messages, strict=True):
        assert words in message
    facts = inspect(InspectSettings(model_path=str(tmp_path), device="cpu", dtype="float32"))
    read = {message for message in caplog.messages if message.startswith("lm_head.weight is not used")}
    assert set(facts["warnings"]) == set(caplog.messages) - read  # which headers do not show


def test_a_module_may_be_spread_over_files(tmp_path: Path) -> None:
    """Else the shards of the table would not show that the reader brings them together."""
    layout = LAYOUTS["transformers, shards"]
    layout.write(tmp_path, random_model(layout.recipe))
    store = open_checkpoint(tmp_path).store
    module = "model.layers.0.mlp.up_proj"
    assert len({store.file(f"{module}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}) == 3
