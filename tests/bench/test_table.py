"""`gptq-api bench`: its rows are what the engine does, its files hold what its table shows."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.table import Table

from gptq_api.cli.bench import run
from gptq_api.cli.output import table_console
from gptq_api.config import BenchSettings
from gptq_api.text.samples import encode_documents, read_documents, windows
from gptq_api.text.tokenizer import load_tokenizer
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.float_models import TEXT, add_tokenizer, perplexity, vocab_size

pytestmark = pytest.mark.slow

RECIPE = Recipe(vocab_size=vocab_size(), max_position_embeddings=128)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in 4 bits with act-order, and the same weights, dequantized, as an FP16 folder."""
    root = tmp_path_factory.mktemp("bench")
    model = random_model(Recipe(**{**RECIPE.__dict__, "act_order": True}))
    dense = {name: tensor.half() for name, tensor in model.dense.items()}
    dense |= {f"{name}.weight": module.dequantized().half() for name, module in model.modules.items()}
    folders = {
        "gptq": write_checkpoint(root / "tiny-gptq", model),
        "fp16": write_checkpoint(root / "tiny", model, tensors=dense),
    }
    for folder in folders.values():
        add_tokenizer(folder)
    return folders


def settings(**values: Any) -> BenchSettings:
    small = {"device": "cpu", "num_threads": 1, "prompt_tokens": 8, "num_tokens": 8, "dtype": "float32", "batch": [1]}
    return BenchSettings.model_construct(**{**small, **values})


def reference_perplexity(folder: Path, length: int, num_windows: int) -> float:
    """transformers on the FP16 folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found = windows(encode_documents(read_documents(TEXT), TEXT, load_tokenizer(folder), None, vocab_size()), length)
    chosen = [found[i * len(found) // num_windows] for i in range(num_windows)]
    return perplexity(model, chosen)


@dataclass(frozen=True)
class Measured:
    report: Any
    png: bytes
    shown: str


@pytest.fixture(scope="module")
def measured(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Both models with a text, by batches, twice each."""
    root = tmp_path_factory.mktemp("measured")
    files = {"json_file": root / "bench.json", "png": root / "bench.png"}
    many: dict[str, Any] = {"text": TEXT, "context": 100, "num_windows": 12, "batch": [8, 1, 3], "repeats": 2}
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert run(settings(models=[str(folders["gptq"])], fp16=folders["fp16"], **many, **files)) == 0
    return Measured(json.loads(files["json_file"].read_text()), files["png"].read_bytes(), shown.getvalue())


def test_rows_against_transformers_and_both_files(folders: dict[str, Path], measured: Measured) -> None:
    report = measured.report
    first, second = report["rows"]
    assert (first["name"], first["kind"], first["bits"]) == ("tiny", "dense", [])
    assert (second["name"], second["kind"]) == ("tiny-gptq", "gptq")
    assert (second["bits"], second["group_sizes"], second["act_order"]) == ([4], [32], "yes")
    expected = reference_perplexity(folders["fp16"], 100, 12)
    assert first["perplexity"] == pytest.approx(expected, rel=1e-3)
    assert second["perplexity"] == pytest.approx(expected, rel=5e-3)  # dequantized there to float16
    assert first["perplexity_tokens"] == second["perplexity_tokens"] > 1000
    assert second["speed_up"] == pytest.approx(first["seconds_per_token"] / second["seconds_per_token"])
    assert first["speed_up"] == 1.0 and report["machine"]["torch"] == torch.__version__
    # 14 Linears of 4 bits instead of 32, and the same embedding and head beside them.
    assert second["weights_mib"] < first["weights_mib"] < second["peak_mib"]
    assert measured.png.startswith(b"\x89PNG")
    out = measured.shown
    row = next(line for line in out.splitlines() if "tiny-gptq" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells[:4] == ["tiny-gptq", "4", "32", "yes"] and cells[6] == f"{second['perplexity']:.4f}"
    assert cells[8] == f"{second['speed_up']:.2f}x"
    assert "tokens of LICENSE in windows of 100" in out


def test_batches_repeats_and_the_ratio_of_both(measured: Measured) -> None:
    report = measured.report
    first, second = report["rows"]
    for row in (first, second):
        assert [found["batch"] for found in row["decoding"]] == [1, 3, 8] and row["repeats"] == 2
        assert row["seconds_per_token"] == row["decoding"][0]["seconds_per_step"]
        assert all(found["seconds_per_step"] > 0 and found["spread"] >= 0 for found in row["decoding"])
    ratios = second["speed_up_by_batch"]
    assert ratios["8"] == pytest.approx(
        first["decoding"][2]["seconds_per_step"] / second["decoding"][2]["seconds_per_step"]
    )
    assert set(ratios) == {"1", "3", "8"} and ratios["1"] == second["speed_up"]
    out = measured.shown
    for words in ("spread", "tokens/s x 3", "tokens/s x 8", "in 2 repeats", report["machine"]["cpu"], " UTC"):
        assert words in " ".join(out.split()), words
    assert f"({ratios['8']:.2f}x)" in out


def test_defaults_fit_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    """The context is one of 128 tokens."""
    file = tmp_path / "bench.json"
    models = [str(folders["gptq"])]
    found = BenchSettings.model_construct(models=models, device="cpu", num_threads=1, repeats=1, json_file=file)
    assert run(found) == 0
    row = json.loads(file.read_text())["rows"][1]
    assert row["context_tokens"] == 32 and row["context_tokens"] + row["decoded_tokens"] + 4 <= 128
    batches = [found["batch"] for found in row["decoding"]]
    assert batches == [1, 8, 64][: len(batches)], "a batch that takes minutes is left out"


def test_the_demo_model_alone_says_what_its_first_row_is(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    command = [sys.executable, "-m", "gptq_api", "bench", "--device", "cpu"]
    command += ["--num-tokens", "4", "--prompt-tokens", "4"]
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [(row["name"], row["kind"]) for row in rows] == [("demo", "dequantized"), ("demo", "gptq")]
    assert rows[1]["weights_mib"] < 0.6 * rows[0]["weights_mib"]
    shown = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if line[0] == "│"]
    assert shown[0][:2] == ["demo (dequantized, bfloat16)", "16"] and shown[1][:4] == ["demo", "4", "32", "yes"]
    assert [row[6] for row in shown] == ["-", "-"]
    assert "--fp16 FOLDER measures the original" in done.stdout


def test_no_cell_is_broken_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """However wide a busy machine makes the figures."""
    table = Table("row", "s/token")
    table.add_row("demo (dequantized, bfloat16)", "0.12345 ± 0.12345 " * 12)
    table_console().print(table)
    assert len(capsys.readouterr().out.splitlines()) == 5


def refused(capsys: pytest.CaptureFixture[str], **values: Any) -> str:
    assert run(settings(**values)) == 1
    out, err = capsys.readouterr()
    told = [line for line in err.splitlines() if not line.startswith("measuring")]
    assert out == "" and len(told) == 1 and told[0].startswith("gptq-api bench: ")
    return told[0]


def test_bad_inputs_are_one_sentence(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [str(folders["gptq"])]
    assert "does not exist" in refused(capsys, models=[str(tmp_path / "nowhere")])
    assert "--revision main is for models on the hub" in refused(capsys, models=models, revision="main")
    assert "no folder" in refused(capsys, models=models, json_file=tmp_path / "no" / "bench.json")
    assert "--text" in refused(capsys, models=models, text=tmp_path / "none.txt")
    assert "is quantized already" in refused(capsys, models=models, fp16=folders["gptq"])
    assert "has a context of 128 tokens" in refused(capsys, models=models, num_tokens=200)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "--png needs matplotlib" in refused(capsys, models=models, png=tmp_path / "bench.png")
