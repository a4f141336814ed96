"""What configs say of single modules, what zero points look like, and what is slow: told, and never obeyed blindly."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_api.checkpoint.checkpoint import CheckpointError, open_checkpoint
from gptq_api.checkpoint.claims import Claim, ClaimTable, parse_dynamic, parse_extra_config
from gptq_api.checkpoint.packing import ZeroVersion, pack_qzeros
from gptq_api.checkpoint.quant_config import QuantConfig, parse_quant_config, read_quant_config
from gptq_api.checkpoint.summary import summarise
from gptq_api.checkpoint.zeros import ZeroStatistics, sniff_zero_version
from tests.checkpoint.test_checkpoint import load
from tests.support.checkpoints import RandomModel, Recipe, random_model, write_checkpoint
from tests.support.layouts import LAYOUTS

DYNAMIC = {
    r"-:model\.layers\.1\.": {},
    r"+:.*\.(gate|up)_proj": {"bits": 8, "group_size": 64},
    r".*_proj": {"sym": False},
    r"model\.layers\.2\..*": {"bits": 2},
}
DEFAULT = Claim(bits=4, group_size=128, sym=True)


def test_the_first_rule_that_matches_from_the_start_wins() -> None:
    table = ClaimTable(DEFAULT, parse_dynamic(DYNAMIC, "quantize_config.json"))
    assert table.of("model.layers.1.mlp.up_proj") == Claim(quantized=False)
    assert table.of("model.layers.2.mlp.up_proj") == Claim(bits=8, group_size=64, sym=True)
    assert table.of("model.layers.2.self_attn.q_proj") == Claim(bits=4, group_size=128, sym=False)
    assert table.of("other.model.layers.1.x") == DEFAULT
    assert table.of("lm_head") == DEFAULT


def test_names_of_auto_round_are_names() -> None:
    rules = parse_extra_config({"lm_head": {"bits": 16}, "a.b": {"bits": 8, "group_size": None}}, "config.json")
    table = ClaimTable(DEFAULT, rules)
    assert table.of("lm_head") == Claim(quantized=False)
    assert table.of("a.b") == replace(DEFAULT, bits=8) and table.of("aXb") == DEFAULT


def test_a_pattern_that_takes_years_takes_half_a_second(tmp_path: Path) -> None:
    evil = {r"(\w|\w\w|\w\w\w|\w\w\w\w|\.|\.\w)+(?<!j)$": {"bits": 8}}
    quant = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": evil}
    folder = write_checkpoint(tmp_path, random_model(Recipe()), quant_config=quant)
    started = time.monotonic()
    warnings = open_checkpoint(folder).warnings
    assert time.monotonic() - started < 5
    assert len(warnings) == 1 and "patterns that take too long" in warnings[0]


@pytest.mark.parametrize(
    ("quant", "words"),
    [
        ({"dynamic": {r"-:.*\.q_proj": {}}}, "q_proj is not quantized but it is"),
        ({"dynamic": {r".*\.q_proj": {"bits": 8}}}, "says 8 bits but model.layers.0.self_attn.q_proj has 4"),
        ({"dynamic": {r".*\.k_proj": {"group_size": 64}}}, "group size 64 but model.layers.0.self_attn.k_proj has"),
        ({"extra_config": {"model.layers.0.mlp.up_proj": {"bits": 3}}}, "says 3 bits but model.layers.0.mlp.up_proj"),
        ({"lm_head": True}, "lm_head is quantized but"),
    ],
)
def test_claims_that_are_wrong_are_one_warning(quant: dict[str, Any], words: str, tmp_path: Path) -> None:
    full = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, **quant}
    warnings = open_checkpoint(
        write_checkpoint(tmp_path, random_model(Recipe(num_layers=1)), quant_config=full)
    ).warnings
    assert len(warnings) == 1 and words in warnings[0] and "the tensors decide" in warnings[0]


@pytest.mark.parametrize(
    ("layout", "claim", "version", "where"),
    [
        ("TGI", Claim(bits=4, group_size=32, sym=False), None, "gptq_bits and others"),
        ("AutoGPTQ, metadata alone", Claim(bits=4, group_size=32, desc_act=True), None, "metadata"),
        ("AutoGPTQ, synonyms", Claim(bits=4, group_size=32), None, "quant_config.json"),
        ("AutoRound, its own packing", Claim(bits=4, group_size=32, sym=False), 2, "quantization_config"),
        (
            "GPTQModel v2, asymmetric",
            Claim(bits=4, group_size=32, desc_act=False, sym=False),
            2,
            "quantize_config.json",
        ),
    ],
)
def test_where_claims_come_from(layout: str, claim: Claim, version: int | None, where: str, tmp_path: Path) -> None:
    LAYOUTS[layout].write(tmp_path, random_model(LAYOUTS[layout].recipe))
    config = open_checkpoint(tmp_path).config
    assert (config.claim, config.zero_version) == (claim, version)
    assert config.source is not None and where in config.source


def test_one_file_counts() -> None:
    assert parse_quant_config({"bits": 4, "format": "gptq_v2"}, "x").zero_version == 2
    assert parse_quant_config({"bits": 4, "checkpoint_format": "gptq", "format": "gptq_v2"}, "x").zero_version == 1
    assert read_quant_config(Path(__file__).parent) == QuantConfig()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_symmetric_zeros_show_their_version(bits: int, version: ZeroVersion) -> None:
    zeros = torch.full((5, 64), 1 << (bits - 1), dtype=torch.uint8)
    assert sniff_zero_version(pack_qzeros(zeros, bits, version), bits) == version
    zeros[4, 63] -= 1
    assert sniff_zero_version(pack_qzeros(zeros, bits, version), bits) is None


@pytest.fixture(scope="module", params=[2, 3, 4])
def asymmetric(request: pytest.FixtureRequest) -> RandomModel:
    return random_model(Recipe(num_layers=1, bits=request.param, sym=False))


@pytest.mark.parametrize("written", [1, 2])
@pytest.mark.parametrize("said", [1, 2])
def test_zero_points_off_the_middle_name_the_other_version(
    written: ZeroVersion, said: ZeroVersion, asymmetric: RandomModel, tmp_path: Path
) -> None:
    forms = {1: "gptq", 2: "gptq_v2"}
    quant = {"bits": asymmetric.recipe.bits, "group_size": 32, "checkpoint_format": forms[said]}
    folder = write_checkpoint(tmp_path, asymmetric, zero_version=written, quant_config=quant)
    warnings = open_checkpoint(folder).warnings
    if written == said:
        assert warnings == ()
    elif asymmetric.recipe.bits > 2 or said == 1:
        # 2 bits: what is one too low wraps around, so that reading v1 as v2 may look right.
        assert len(warnings) == 1
        assert f"read as v{said}" in warnings[0] and f'"checkpoint_format": "{forms[written]}"' in warnings[0]


SAID: dict[str, dict[str, Any] | None] = {
    "config": {"bits": 4, "format": ""},
    "silent config": {"bits": 4},
    "none": None,
}


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("written", [1, 2])
def test_the_version_is_one_for_the_checkpoint(written: ZeroVersion, said: str, tmp_path: Path) -> None:
    """A module whose zero points are all 7 looks symmetric in a v2 file when seen alone (9 in a v1 file)."""
    model = random_model(Recipe(num_layers=1, sym=False))
    lone = "model.layers.0.self_attn.k_proj"
    module = model.modules[lone]
    model.modules[lone] = replace(module, zeros=torch.full_like(module.zeros, 7 if written == 2 else 9))
    quant = SAID[said]
    if quant is not None and "format" in quant:
        quant = quant | {"format": "gptq_v2" if written == 2 else "gptq"}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, model, zero_version=written, quant_config=quant))
    for name, source in model.modules.items():
        assert torch.equal(checkpoint.gptq(name).zeros, source.zeros), name
    assert summarise(checkpoint).zero_versions == {f"v{written}": 7} and summarise(checkpoint).num_sym == 0
    warnings = " ".join(checkpoint.warnings)
    if said == "config":
        assert f"those of {lone} look like v{3 - written}; the config decides" in warnings
    elif written == 2:
        assert (
            "the tensors show v2" in warnings if said == "silent config" else "by all zero points together" in warnings
        )
    else:
        assert warnings == ""


def test_a_few_zero_points_that_are_alike_show_nothing(tmp_path: Path) -> None:
    """One module with 32 of them, under a config that knows."""
    dense = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = random_model(Recipe(num_layers=1, group_size=-1, dense=dense))
    (name,) = model.modules
    model.modules[name] = replace(model.modules[name], zeros=torch.full_like(model.modules[name].zeros, 7))
    quant = {"bits": 4, "checkpoint_format": "gptq_v2"}
    folder = write_checkpoint(tmp_path, model, zero_version=2, quant_config=quant)
    assert int(open_checkpoint(folder).gptq(name).zeros.max()) == 7


def test_zero_points_far_from_any_middle() -> None:
    counts = torch.zeros(16, dtype=torch.int64)
    counts[13] = 300
    complaint = ZeroStatistics(4, 1, counts).complaint()
    assert complaint is not None and "mostly 13" in complaint and "neither v1 nor v2" in complaint
    counts = torch.full((16,), 30)
    assert ZeroStatistics(4, 1, counts).complaint() is None
    counts[15] += 100
    assert ZeroStatistics(8, 1, counts).complaint() is None


@pytest.mark.usefixtures("no_compiler")
def test_slow_modules_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no memory to dequantize what no kernel takes."""
    folder = write_checkpoint(tmp_path, random_model(Recipe(num_layers=1, group_size=8, dense=("v_proj", "k_proj"))))
    modules = open_checkpoint(folder).modules
    needed = 2 * sum(m.in_features * m.out_features for m in modules.values())
    why = "the slow path: groups of 8 in {} inputs (the int4 operator takes multiples of 32), and there is no memory"
    for room, told in ((2 * needed, True), (2 * needed + 1, False)):
        monkeypatch.setattr("gptq_api.runner.backends.host_memory", lambda room=room: room)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load(folder, dtype="bfloat16")
        assert sum(why.format(64) in message for message in caplog.messages) == told
        assert sum(why.format(160) in message for message in caplog.messages) == told
        assert told or not caplog.messages


def test_flags_that_one_module_contradicts(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, random_model(Recipe(num_layers=1, mixed_bits={"v_proj": 8})))
    with pytest.raises(CheckpointError, match=r"--gptq-wbits 4 contradicts .*v_proj has 8 bits"):
        load(folder, gptq_wbits=4)
