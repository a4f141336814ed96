"""Synthetic checkpoints: the same through files and without, of the promised shape, and sane activations."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from gptq_api.bench import synthetic
from gptq_api.bench.measure import measure
from gptq_api.checkpoint.checkpoint import open_checkpoint
from gptq_api.checkpoint.dense import open_dense
from gptq_api.checkpoint.summary import summarise
from gptq_api.cli import bench
from gptq_api.config import BenchSettings
from gptq_api.errors import ConfigError
from gptq_api.kernels.reference import dequantize
from gptq_api.model.eagle import read_head
from gptq_api.runner.load import load_runner, make_runner
from gptq_api.runner.memory import host_memory
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.solo import Solo, step_of
from gptq_api.settings_source import load_settings
from gptq_api.text.tokenizer import load_tokenizer
from gptq_api.types import SamplingParams
from tests.support.eagle_heads import needs_taps

TINY = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2100,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(synthetic.SHAPES, "tiny", TINY)


@pytest.mark.parametrize(("group_size", "act_order"), [(128, False), (128, True), (-1, False)])
def test_a_written_folder_is_the_checkpoint_in_memory(group_size: int, act_order: bool, tmp_path: Path) -> None:
    memory = synthetic.synthetic_checkpoint("tiny", tmp_path / "memory", group_size=group_size, act_order=act_order)
    synthetic.write_folder("tiny", tmp_path / "files", group_size=group_size, act_order=act_order)
    files = open_checkpoint(tmp_path / "files")
    assert files.warnings == () and files.modules == memory.modules and files.store.names == memory.store.names
    for name in memory.store.names:
        assert (memory.store.shape(name), memory.store.dtype(name)) == (
            files.store.shape(name),
            files.store.dtype(name),
        )
        if not torch.cuda.is_available():
            assert torch.equal(memory.store.read(name), files.store.read(name))
    found = summarise(files)
    assert found.num_sym == 21 and found.group_sizes == {group_size: 21} and found.num_act_order == 21 * act_order
    settings = LoadOptions(model_path=str(tmp_path / "files"), device="cpu", dtype="float32", num_threads=1)
    assert load_runner(settings).vocab_size == 2100


@needs_taps
def test_an_eagle_head_is_one_for_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(synthetic.SHAPES, "tiny", {**TINY, "num_hidden_layers": 8})
    served, folder = synthetic.synthetic_checkpoint("tiny", tmp_path / "served"), tmp_path / "head"
    synthetic.write_eagle_head("tiny", folder, draft_vocab_size=300)
    options = LoadOptions(draft_model=str(folder), device="cpu", num_threads=1, num_blocks=8, packed_cache="off")
    runner = make_runner(options, served, torch.device("cpu"))
    assert runner.drafter is not None and runner.drafter.ahead == 1
    assert "EAGLE-3 head for 300 tokens, reads the stream before layers 2, 4, 5" in runner.description
    head = read_head(folder, 8)
    targets = torch.arange(300) + open_dense(folder).store.read("d2t")
    assert head.draft_vocab_size == 300 and int(targets[-1]) < 2100 and len(set(targets.tolist())) == 300


def test_linears_with_the_same_input_share_their_order(tmp_path: Path) -> None:
    checkpoint = synthetic.synthetic_checkpoint("tiny", tmp_path, act_order=True)

    def order(name: str) -> torch.Tensor:
        return checkpoint.gptq(f"model.layers.1.{name}_proj").g_idx

    assert torch.equal(order("self_attn.q"), order("self_attn.v"))
    assert torch.equal(order("mlp.gate"), order("mlp.up"))
    assert not torch.equal(order("mlp.gate"), order("self_attn.q"))


def test_a_linear_keeps_activations_of_order_one(tmp_path: Path) -> None:
    for dense in (False, True):
        checkpoint = synthetic.synthetic_checkpoint("tiny", tmp_path, dense=dense)
        name = "model.layers.0.mlp.up_proj"
        if dense:
            weight = checkpoint.tensor(f"{name}.weight", (384, 256)).float()
        else:
            t = checkpoint.gptq(name)
            weight = dequantize(t.qweight, t.zeros, t.scales, t.g_idx, 4).t()
        assert 0.8 < float(functional.linear(torch.randn(64, 256), weight).std()) < 1.2


def test_the_unquantized_twin_runs_without_files(tmp_path: Path) -> None:
    checkpoint = synthetic.synthetic_checkpoint("tiny", tmp_path, dense=True)
    settings = LoadOptions(model_path=str(tmp_path), device="cpu", dtype="float32", num_threads=1)
    assert make_runner(settings, checkpoint, torch.device("cpu")).weight_bytes > 2 * 2100 * 256
    synthetic.write_folder("tiny", tmp_path, dense=True)
    assert open_dense(tmp_path).modules == {}


def test_every_token_of_the_padded_vocabulary_has_a_text(tmp_path: Path) -> None:
    synthetic.write_small_files("tiny", tmp_path, 128, False)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 2100
    assert all(tokenizer.decode([i]) for i in range(2048, 2100))
    assert max(tokenizer.encode("Tell me a story about ~2050 foxes.", add_bos=True)) < 2048


def test_the_table_of_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = BenchSettings(synthetic="llama-13b", device="cpu", num_threads=1, num_tokens=6, prompt_tokens=4)
    jobs = bench._jobs(settings)
    assert [(job.kind, job.group_size, job.act_order) for job in jobs] == [
        ("dense", 128, False),
        ("gptq", 128, True),
        ("gptq", 128, False),
        ("gptq", -1, False),
    ]
    monkeypatch.setitem(synthetic.SHAPES, "llama-13b", TINY)
    dense, *quantized = [measure(job) for job in jobs]
    assert dense.bits == [] and dense.seconds_per_token > 0
    assert [(row.bits, row.group_sizes, row.act_order) for row in quantized] == [
        ([4], [128], "yes"),
        ([4], [128], "no"),
        ([4], [-1], "no"),
    ]
    assert all(row.weights_mib < dense.weights_mib and row.shape == dense.shape for row in quantized)
    assert all(row.threads == 1 and row.decoded_tokens == 6 for row in (dense, *quantized))


def test_few_tokens_of_random_weights_are_decoded_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(synthetic.SHAPES, "tinyllama-1.1b", TINY)
    settings = load_settings(
        BenchSettings, ["--synthetic", "tinyllama-1.1b", "--device", "cpu", "--prompt-tokens", "4"]
    )
    row = measure(bench._jobs(settings)[2])
    assert row.decoded_tokens == 32 and row.threads == len(os.sched_getaffinity(0))


@pytest.mark.skipif((host_memory() or 0) > 34 * 2**30, reason="this machine holds a 70B")
def test_what_memory_does_not_hold_is_said_before_it_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run(BenchSettings(synthetic="llama-70b", device="cpu")) == 1
    left_out, refused = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("measuring"))
    free = r"takes \d+\.\d GiB, and \d+\.\d GiB of memory are free"
    assert re.fullmatch(rf"llama-70b random {free}; it is left out, and speed-ups are over the next one", left_out)
    assert re.fullmatch(rf"gptq-api bench: llama-70b g128 act-order {free}", refused)


def test_an_unquantized_model_decodes_with_all_threads(tmp_path: Path) -> None:
    checkpoint = synthetic.synthetic_checkpoint("tiny", tmp_path, dense=True)
    before = torch.get_num_threads()
    try:
        runner = make_runner(LoadOptions(device="cpu", num_threads=2), checkpoint, torch.device("cpu"))
        runner.collect(runner.launch(step_of([Solo([1, 2, 3], SamplingParams(max_tokens=1), block_table=[0])], [3])))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("more", [["--text", "a"], ["--fp16", "a"], ["--models", "a"], ["--revision", "a"]])
def test_random_weights_go_with_no_model(more: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"^{more[0]} does nothing beside --synthetic, which measures random weights"):
        load_settings(BenchSettings, ["--synthetic", "llama-7b", *more])
