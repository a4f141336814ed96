"""`gptq-api quantize` on small models: what it writes is what it computed, and what GPTQ promises holds."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptq_api import __version__
from gptq_api.checkpoint import large_pages
from gptq_api.checkpoint.checkpoint import open_checkpoint
from gptq_api.checkpoint.dense import dequantized, open_dense
from gptq_api.cli.quantize import run
from gptq_api.config import QuantizeSettings
from gptq_api.demo import DEMO_PATH
from gptq_api.model.config import read_config
from gptq_api.quantize.block import batches
from gptq_api.quantize.driver import Recipe as How
from gptq_api.quantize.driver import quantize_model
from gptq_api.quantize.gptq import QuantizeOptions, round_to_nearest
from gptq_api.quantize.output import write_checkpoint as write_output
from gptq_api.quantize.work import ModuleReport, WorkFolder
from gptq_api.text.samples import hold_out, spread, windows
from gptq_api.text.tokenizer import load_tokenizer
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.float_models import TEXT, add_tokenizer, perplexity, random_folder, train, vocab_size

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Small products gain nothing from a second thread, and wait for it where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained") / "prose")


def settings(model: Path, out: Path, **values: Any) -> QuantizeSettings:
    text = {"calibration": TEXT, "num_samples": 16, "num_eval_samples": 8, "sample_length": 64, "group_size": 32}
    return QuantizeSettings.model_construct(**{"model_path": str(model), "out": out, **text, "device": "cpu", **values})


def reference_perplexity(folder: Path, texts: list[list[int]], checkpoint: Any = None) -> float:
    """transformers' LlamaForCausalLM in float32, its weights read by our reader and dequantized."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = AutoConfig.from_pretrained(folder)
    if hasattr(raw, "quantization_config"):
        del raw.quantization_config
    model = AutoModelForCausalLM.from_config(raw, dtype=torch.float32, attn_implementation="eager").eval()
    state = {
        name: (checkpoint.tensor(name, tuple(tensor.shape)) if name.endswith("weight") else checkpoint.store.read(name))
        for name, tensor in model.state_dict().items()
        if checkpoint.has(name) or name.endswith("bias")
    }
    missing, _ = model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    assert missing in ([], ["lm_head.weight"])
    return perplexity(model, texts)


def texts_of(
    folder: Path, num: int = 16, num_eval: int = 8, length: int = 64
) -> tuple[list[list[int]], list[list[int]]]:
    ids = load_tokenizer(folder).encode(TEXT.read_text().strip(), add_bos=True)
    rest, evaluation = hold_out(windows([ids], length), num_eval)
    return spread(rest, num), evaluation


def perplexities(folder: Path) -> tuple[float, float]:
    """(before, after), from the model card."""
    card = (folder / "README.md").read_text()
    before, after = (float(re.search(rf"\| {word} \| ([\d.]+) \|", card)[1]) for word in ("before", "after"))  # type: ignore[index]
    return before, after


MATRIX = [
    {"bits": 4, "act_order": True},
    {"bits": 4, "group_size": -1, "sym": False},
    {"bits": 4, "act_order": True, "static_groups": True, "sym": False, "format": "gptq_v2"},
    {"bits": 3, "act_order": True, "sym": False},
    {"bits": 2, "sym": False, "format": "gptq_v2", "group_size": 48},
    {"bits": 8, "group_size": 128},
    {"bits": 4, "group_aware": True},
]


@pytest.mark.parametrize("values", MATRIX, ids=lambda values: "-".join(f"{k}={v}" for k, v in values.items()))
def test_what_is_written_is_what_was_measured(trained: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    out = tmp_path / "out"
    assert run(settings(trained, out, **values)) == 0
    checkpoint = open_checkpoint(out)
    assert not checkpoint.warnings
    wanted = {"group_size": 32, "act_order": False, "static_groups": False, "sym": True, **values}
    wanted.setdefault("format", "gptq" if wanted["sym"] else "gptq_v2")
    for name in checkpoint.modules:
        module = checkpoint.gptq(name)
        size = wanted["group_size"] if 0 < wanted["group_size"] < module.in_features else -1
        assert (module.bits, module.group_size) == (values["bits"], size)
        assert module.act_order == (wanted["act_order"] and not wanted["static_groups"]), name
        assert module.sym or not wanted["sym"]
        assert module.zero_version == (2 if wanted["format"] == "gptq_v2" else 1)
    quantization = json.loads((out / "quantize_config.json").read_text())
    assert json.loads((out / "config.json").read_text())["quantization_config"] == quantization
    assert (quantization["desc_act"], quantization["sym"]) == (wanted["act_order"], wanted["sym"])
    assert quantization["checkpoint_format"] == wanted["format"]
    by_default = wanted["bits"] < 4 and not wanted["act_order"] and wanted["group_size"] > 0
    assert quantization["act_group_aware"] == wanted.get("group_aware", by_default)
    _, evaluation = texts_of(trained)
    before, after = perplexities(out)
    assert before == pytest.approx(reference_perplexity(trained, evaluation, open_dense(trained)), rel=1e-3)
    assert after == pytest.approx(reference_perplexity(out, evaluation, dequantized(checkpoint)), rel=1e-3)
    assert after > before or values["bits"] == 8
    assert not (tmp_path / "out.partial").exists()


def test_better_than_rounding(trained: Path, tmp_path: Path) -> None:
    """fp < act-order, GPTQ < round to nearest, in perplexity and in every module's mean output error."""
    found: dict[str, tuple[float, float]] = {}
    for name, values in {"act": {"act_order": True}, "gptq": {}, "nearest": {"nearest": True}}.items():
        assert run(settings(trained, tmp_path / name, bits=3, num_samples=32, **values)) == 0
        card = (tmp_path / name / "README.md").read_text()
        errors = [float(value) for value in re.findall(r"_proj \| ([\d.]+) %", card)]
        assert len(errors) == 7
        found[name] = (perplexities(tmp_path / name)[1], sum(errors))
    before = perplexities(tmp_path / "gptq")[0]
    assert before < found["act"][0] < found["nearest"][0] and before < found["gptq"][0] < found["nearest"][0]
    assert found["act"][1] < 0.8 * found["nearest"][1] and found["gptq"][1] < 0.8 * found["nearest"][1]


def test_rounding_needs_no_text_and_is_exact(tmp_path: Path) -> None:
    model = random_folder(tmp_path / "model")
    out = tmp_path / "out"
    assert run(settings(model, out, nearest=True, calibration=None)) == 0
    source, checkpoint = open_dense(model), open_checkpoint(out)
    for name, shape in checkpoint.modules.items():
        weight = source.tensor(f"{name}.weight", (shape.out_features, shape.in_features)).float()
        result = round_to_nearest(weight, QuantizeOptions(4, 32))
        wanted = replace(result, scales=result.scales.half().float()).dequantize()
        read = dequantized(checkpoint).tensor(f"{name}.weight", (shape.out_features, shape.in_features))
        assert torch.equal(read, wanted), name
    assert "Perplexity was not measured" in (out / "README.md").read_text()


def test_shards_in_and_out_make_no_difference(tmp_path: Path) -> None:
    outs = [tmp_path / "from-one", tmp_path / "from-shards"]
    for out, container in zip(outs, ("safetensors", "sharded"), strict=True):
        model = random_folder(tmp_path / container, container=container)
        assert run(settings(model, out, act_order=True)) == 0
    assert (outs[0] / "model.safetensors").read_bytes() == (outs[1] / "model.safetensors").read_bytes()
    source, config = open_dense(model), read_config(model)
    how = How(QuantizeOptions(4, 32), nearest=True)
    with WorkFolder(tmp_path / "split", {}) as work:
        quantize_model(source, config, how, [], [], work, CPU, lambda _: None)
        write_output(source, config, how, "", work, max_shard_bytes=150_000)
    shards = sorted((tmp_path / "split").glob("model-*.safetensors"))
    assert len(shards) > 2 and sum(len(load_file(shard)) for shard in shards) == len(
        load_file(outs[0] / "model.safetensors")
    )
    assert len(open_checkpoint(tmp_path / "split").modules) == 14


def test_a_killed_run_goes_on_and_ends_in_the_same_files(trained: Path, tmp_path: Path) -> None:
    model = train(tmp_path / "model", num_layers=6, num_steps=1)
    whole, resumed = tmp_path / "a" / "out", tmp_path / "b" / "out"
    for out in (whole, resumed):
        out.parent.mkdir()
    values: dict[str, Any] = {"act_order": True, "num_threads": 1, "num_samples": 24}
    assert run(settings(model, whole, **values)) == 0
    flags = "--group-size 32 --num-samples 24 --num-eval-samples 8 --sample-length 64 --act-order --num-threads 1"
    command = [sys.executable, "-m", "gptq_api", "quantize", str(model), str(resumed), "--device", "cpu"]
    command += ["--calibration", str(TEXT), *flags.split()]
    partial = resumed.with_name("out.partial")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (partial / "layer-00001.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not resumed.exists() and (partial / "layer-00001.safetensors").exists()
    assert not (partial / "layer-00005.safetensors").exists()
    times = {file: file.stat().st_mtime_ns for file in partial.glob("layer-*.safetensors")}
    (partial / "layer-00004.unfinished").write_bytes(b"half a layer")
    kept = (partial / "layer-00001.safetensors").read_bytes()
    # Another run may not take the work over, nor this one with other settings.
    assert run(settings(model, resumed, **{**values, "bits": 3})) == 1
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert (partial / "layer-00001.safetensors").read_bytes() == kept
    assert run(settings(model, resumed, **values)) == 0
    files = sorted(file.name for file in whole.iterdir())
    assert files == sorted(file.name for file in resumed.iterdir())
    for name in files:
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which root can make."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = shutil.which("mount") and os.geteuid() == 0
    if not made or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", disk], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk_says_how_much_it_needs_and_the_run_goes_on(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the first layer, in the second, in the checkpoint."""
    model, out = random_folder(tmp_path / "model"), small_disk / "out"
    partial = small_disk / "out.partial"
    for size, name, words in (
        (8, "layer-00000.safetensors", "0.03 MiB and 0.00 are free"),
        (44, "layer-00001.safetensors", "0.03 MiB and 0.01 are free"),
        (200, "checkpoint", "0.56 MiB and 0.13 are free"),
    ):
        subprocess.run(["mount", "-o", f"remount,size={size}k", small_disk], check=True)
        assert run(settings(model, out)) == 1
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith(
            f"gptq-api quantize: {partial / name} cannot be written: No space left on device; it needs "
        )
        assert told.endswith(f"{words}; the same command goes on with what is left")
        assert not out.exists() and not list(partial.glob("*.unfinished")) and not (partial / "checkpoint").exists()
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert run(settings(model, out)) == 0
    assert run(settings(model, tmp_path / "whole")) == 0
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("size", "stored", "words"),
    [
        (160, -1, "--group-size 160: no module has more than 160 inputs, so each output has one group (-1)"),
        (1_000_000, -1, "no module has more than 160 inputs"),
        (24, 24, "warning: --group-size 24 is served slowly here, and refused by other programs; 32, 64,"),
        (64, 64, None),
    ],
)
def test_group_sizes_that_mean_something_else_are_said(
    size: int, stored: int, words: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_folder(tmp_path / "model")
    assert run(settings(model, tmp_path / "out", nearest=True, calibration=None, group_size=size)) == 0
    err = capsys.readouterr().err
    assert (words in err) if words else "--group-size" not in err
    quantization = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert quantization["group_size"] == stored
    assert not open_checkpoint(tmp_path / "out").warnings


@pytest.mark.parametrize(
    ("values", "form"), [({}, "gptq"), ({"sym": False}, "gptq_v2"), ({"sym": False, "format": "gptq"}, "gptq")]
)
def test_fitted_zero_points_are_stored_as_others_read_them(values: dict[str, Any], form: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(settings(random_folder(tmp_path / "model"), out, nearest=True, calibration=None, **values)) == 0
    quantization = json.loads((out / "quantize_config.json").read_text())
    assert quantization["checkpoint_format"] == quantization["format"] == form
    assert quantization["method"] == quantization["quant_method"] == "gptq"
    assert quantization["meta"]["quantizer"] == [f"gptq-api:{__version__}"]
    checkpoint = open_checkpoint(out)
    assert checkpoint.zero_version == (2 if form == "gptq_v2" else 1) and not checkpoint.warnings


def test_finished_layers_are_not_done_again(tmp_path: Path) -> None:
    model = random_folder(tmp_path / "model")
    source, config = open_dense(model), read_config(model)
    calibration, _ = texts_of(model)
    seen: list[ModuleReport] = []
    with WorkFolder(tmp_path / "out", {}) as work:
        for _ in range(2):
            seen.clear()
            quantize_model(
                source, config, How(QuantizeOptions(4, 32)), batches(calibration, 512), [], work, CPU, seen.append
            )
            first = {i: work.layer_file(i).stat().st_mtime_ns for i in range(2)}
        assert {i: work.layer_file(i).stat().st_mtime_ns for i in range(2)} == first
    assert len(seen) == 14 and all(report.error is not None for report in seen)


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 24},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_measured_as_transformers_does(tmp_path: Path, family: str) -> None:
    recipe = Recipe(vocab_size=vocab_size(), dense=("proj",), attention_bias=family == "qwen2", head_dim=16)
    model = random_model(recipe)
    state = model.tensors()
    generator = torch.Generator().manual_seed(3)
    for i in range(2):
        if family == "qwen3":
            for part in "qk":
                weight = 1 + 0.3 * torch.randn(16, generator=generator)
                state[f"model.layers.{i}.self_attn.{part}_norm.weight"] = weight.half()
        if family == "qwen2":
            state.pop(f"model.layers.{i}.self_attn.o_proj.bias")
    folder = write_checkpoint(tmp_path / family, model, tensors=state, **FAMILIES[family])
    add_tokenizer(folder)
    out = tmp_path / "out"
    assert run(settings(folder, out, num_samples=8)) == 0
    _, evaluation = texts_of(folder, 8)
    before, after = perplexities(out)
    assert before == pytest.approx(reference_perplexity(folder, evaluation, open_dense(folder)), rel=1e-3)
    assert after == pytest.approx(reference_perplexity(out, evaluation, dequantized(open_checkpoint(out))), rel=1e-3)


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("gptq-api quantize: ") and err.count("\n") == 1, err
    return err


def test_bad_inputs_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_folder(tmp_path / "model")
    out = tmp_path / "out"

    def refused(words: str, model: Path = model, out: Path = out, **values: Any) -> None:
        assert run(settings(model, out, **values)) == 1
        assert words in sentence(capsys)
        assert not (tmp_path / "out").exists() or out.name != "out"

    refused("is no folder", model=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("no config.json", model=tmp_path / "empty")
    refused("quantized already (gptq)", model=Path(DEMO_PATH))
    refused("exists; name a folder that does not", out=tmp_path / "empty")
    refused("is no folder; make it first", out=tmp_path / "no" / "out")
    refused("cannot be read", calibration=tmp_path / "none.txt")
    refused("is too short: it gives", num_samples=4000)
    refused("beyond the model's context of 128", sample_length=129)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    refused("is not UTF-8 text", calibration=tmp_path / "bytes.txt")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txet": "b"}\n')
    refused('bad.jsonl line 2 has neither "text"', calibration=tmp_path / "bad.jsonl")
    (model / "tokenizer.json").rename(model / "hidden.json")
    refused("holds neither tokenizer.json nor tokenizer.model", model=model)
    (model / "hidden.json").rename(model / "tokenizer.json")
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1000])
    refused("is not a complete safetensors file", model=model)


def test_widths_that_do_not_fill_words_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(vocab_size=vocab_size(), dense=("proj",), intermediate_size=104)
    model = add_tokenizer(write_checkpoint(tmp_path / "model", random_model(recipe)))
    assert run(settings(model, tmp_path / "out", bits=3)) == 1
    assert "104 outputs, and 3 bits are packed in units of 32" in sentence(capsys)


def test_two_runs_do_not_write_the_same_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_folder(tmp_path / "model")
    with WorkFolder(tmp_path / "out", {}):
        assert run(settings(model, tmp_path / "out")) == 1
    assert "is in use: another run is writing out" in sentence(capsys)


def test_chats_and_documents_as_calibration(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    lines: list[Any] = [{"messages": [{"role": "user", "content": f"What is {i}?"}]} for i in range(12)]
    lines += [{"text": "A grant of copyright licence. " * 40}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert run(settings(trained, tmp_path / "out", calibration=file, num_samples=10, num_eval_samples=4)) == 0
    assert "10 samples of at most 64 of chats.jsonl" in (tmp_path / "out" / "README.md").read_text()


def test_one_layer_is_resident_whatever_the_depth(tmp_path: Path) -> None:
    def most_bytes(num_layers: int) -> int:
        model = train(tmp_path / f"model-{num_layers}", num_layers=num_layers, num_steps=0)
        source, config = open_dense(model), read_config(model)
        calibration, _ = texts_of(model)
        seen: list[int] = []

        def report(module: ModuleReport) -> None:
            if module.module.endswith("down_proj"):
                seen.append(bytes_of_new_tensors())

        gc.freeze()
        try:
            with WorkFolder(tmp_path / f"out-{num_layers}", {}) as work:
                quantize_model(
                    source, config, How(QuantizeOptions(4, 32)), batches(calibration, 512), [], work, CPU, report
                )
        finally:
            gc.unfreeze()
        assert len(seen) == num_layers
        return max(seen)

    layer_bytes = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64)
    shallow = most_bytes(2)
    assert layer_bytes < shallow
    assert most_bytes(8) < shallow + layer_bytes // 4


def test_which_weights_of_several(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    shutil.copyfile(model / "model.safetensors", model / "ema.safetensors")
    values: dict[str, Any] = {"nearest": True, "calibration": None, "eval_text": TEXT}
    assert run(settings(model, tmp_path / "no", **values)) == 1
    assert "several sets of weights (ema.safetensors, model.safetensors); name one with --gptq-ckpt" in sentence(capsys)
    assert run(settings(model, tmp_path / "typo", gptq_ckpt=Path("eam.safetensors"), **values)) == 1
    assert "--gptq-ckpt eam.safetensors: no such file" in sentence(capsys)
    (model / "ema.safetensors").write_bytes(b"")
    assert run(settings(model, tmp_path / "out", gptq_ckpt=Path("model.safetensors"), **values)) == 0


def bytes_of_new_tensors() -> int:
    """Of those made since `gc.freeze`. Weights are cut from memory that is taken 16 MB at a time: they count, and not
    what is left of it."""
    gc.collect()
    left = None if large_pages._block is None else large_pages._block._left
    tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor and item is not left]
    total = end = 0
    for start, stop in sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_makes_as_good_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    """The same texts and recipe: perplexity before is the same, and after differs by what rounding decides."""
    found = {}
    for device in ("cpu", "cuda"):
        assert run(settings(trained, tmp_path / device, device=device, act_order=True)) == 0
        found[device] = perplexities(tmp_path / device)
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-4)
    assert found["cuda"][1] == pytest.approx(found["cpu"][1], rel=0.02)
