"""`gptq-api inspect`: the facts of a checkpoint, as text and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptq_api.cli.inspect import inspect, run
from gptq_api.config import InspectSettings
from gptq_api.runner.cpu import native
from gptq_api.runner.load import load_runner
from gptq_api.runner.options import LoadOptions
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.layouts import LAYOUTS
from tests.support.server import Server
from tests.support.text_tokenizers import byte_level

RECIPE = Recipe(act_order=True, sym=False, mixed_bits={"down_proj": 8}, hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "tiny"
    return byte_level(write_checkpoint(folder, random_model(RECIPE), container="sharded"))


def test_as_text(folder: Path) -> None:
    command = [sys.executable, "-m", "gptq_api", "inspect", str(folder), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    lines = {line[:14].strip(): line[14:] for line in done.stdout.splitlines()}
    assert lines["layout"].startswith("3 shards with an index")
    assert lines["bits"] == "4 (12 modules), 8 (2 modules)"
    assert (lines["group size"], lines["act-order"], lines["symmetric"], lines["zero points"]) == (
        "32",
        "yes",
        "no",
        "v1",
    )
    assert lines["4 bits"].startswith(("7 (", "8 (")) and "others" in lines["4 bits"]
    assert lines["self-check"].startswith("scales finite in 14 of 14 modules")
    kernels = (native.kind(), native.kind()) if native.is_available() else ("int4", "2 x int4")
    assert (lines["q_proj"], lines["down_proj"]) == kernels
    assert lines["KV cache"] == f"{2 * 2 * 2 * 32 * 2} bytes per token"


def test_as_json_and_the_plan_is_what_loading_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(InspectSettings(model_path=str(folder), device="cpu", json_output=True, kv_cache_mib=1)) == 0
    facts = json.loads(capsys.readouterr().out)
    runner: Any = load_runner(LoadOptions(model_path=str(folder), device="cpu", kv_cache_mib=1, num_threads=1))
    assert facts["kv_cache_tokens"] == runner.num_blocks * runner.block_size
    assert facts["quantization"]["bits"] == {"4": 12, "8": 2}
    # Merging q, k and v keeps one permutation instead of three; nothing else differs.
    assert abs(facts["weight_bytes"] - runner._model.num_bytes) / runner._model.num_bytes < 0.05


def test_a_draft_model_is_told_with_what_it_takes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone, both = (
        inspect(InspectSettings(model_path=str(folder), draft_model=draft, device="cpu"))
        for draft in (None, str(folder))
    )
    draft = both["draft_model"]
    assert alone["draft_model"] is None and draft["weight_bytes"] == both["weight_bytes"]
    assert draft["kv_bytes_per_token"] == both["kv_bytes_per_token"]
    assert run(InspectSettings(model_path=str(folder), draft_model=str(folder))) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("draft model"))
    assert "2 layers, hidden 128, 4/8 bits, up to 256 tokens; weights" in told
    assert run(InspectSettings(model_path=str(folder), draft_model="/nowhere")) == 1
    assert "--draft-model /nowhere does not exist; name the folder" in capsys.readouterr().err


def test_several_gpus_are_told_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = inspect(InspectSettings(model_path=str(folder)))
    parts = inspect(InspectSettings(model_path=str(folder), tensor_parallel_size=2))
    assert whole["ranks"] == [] and [rank["device"] for rank in parts["ranks"]] == ["cpu", "cpu"]
    assert sum(rank["weight_bytes"] for rank in parts["ranks"]) == parts["weight_bytes"] >= whole["weight_bytes"]
    assert parts["kv_cache_tokens"] == whole["kv_cache_tokens"]
    assert run(InspectSettings(model_path=str(folder), tensor_parallel_size=2)) == 0
    assert "  rank 1      cpu: " in capsys.readouterr().out
    whole, parts = (
        inspect(
            InspectSettings(model_path=str(folder), tensor_parallel_size=n, draft_model=str(folder), kv_cache_mib=1)
        )
        for n in (1, 2)
    )
    assert parts["draft_model"] == whole["draft_model"]
    runner = load_runner(
        LoadOptions(
            model_path=str(folder), device="cpu", kv_cache_mib=1, tensor_parallel_size=2, draft_model=str(folder)
        )
    )
    assert parts["kv_cache_tokens"] == whole["kv_cache_tokens"] == runner.num_blocks * runner.block_size
    capsys.readouterr()
    assert run(InspectSettings(model_path=str(folder), tensor_parallel_size=2, draft_model=str(folder))) == 0
    assert " bytes per token beside rank 0, on cpu\n" in capsys.readouterr().out
    assert run(InspectSettings(model_path=str(folder), tensor_parallel_size=3)) == 1
    assert "do not divide by 3" in capsys.readouterr().err


def test_windows_and_families_and_old_zeros_are_told(tmp_path: Path) -> None:
    layout = LAYOUTS["GPTQ-for-LLaMa before 2023-03-20, 4 bits"]
    layout.write(tmp_path / "old", random_model(layout.recipe))
    facts = inspect(InspectSettings(model_path=str(tmp_path / "old"), device="cpu"))
    assert facts["quantization"]["zero_version"] == {"float": 7} and facts["architecture"]["name"] == "LLaMA"
    windowed = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    qwen = random_model(Recipe(family="qwen3", head_dim=32, more_config=windowed))
    settings = InspectSettings(model_path=str(byte_level(write_checkpoint(tmp_path / "qwen", qwen))), device="cpu")
    facts = inspect(settings)
    assert facts["architecture"]["name"] == "Qwen3" and facts["architecture"]["eos_token_ids"] == (2,)
    assert facts["architecture"]["sliding_window"] == [{"window": None, "layers": 1}, {"window": 24, "layers": 1}]
    assert run(settings) == 0


def test_a_broken_checkpoint_is_one_sentence_and_status_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(InspectSettings(model_path=str(folder), device="cpu", gptq_groupsize=128)) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--gptq-groupsize 128 contradicts" in err


def test_text_that_cannot_be_served_is_told_behind_the_facts_as_serve_tells_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path, random_model(Recipe()))

    def inspected() -> str:
        assert run(InspectSettings(model_path=str(folder), device="cpu")) == 1
        out, err = capsys.readouterr()
        assert "act-order" in out and err.count("\n") == 1
        assert run(InspectSettings(model_path=str(folder), device="cpu", json_output=True)) == 1
        assert json.loads(capsys.readouterr().out)["refused"] in err
        return err.partition(": ")[2]

    def served() -> str:
        with Server(str(folder), wait=False, command=["serve", str(folder), "--port", "0"]) as server:
            assert server.wait(60) == 1
            return server.log().splitlines()[-1].partition(": ")[2] + "\n"

    sentence = inspected()
    assert "holds neither tokenizer.json nor tokenizer.model" in sentence and sentence == served()
    byte_level(folder)
    (folder / "chat_template.jinja").write_text("{% for %}")
    sentence = inspected()
    assert "chat_template.jinja" in sentence and sentence == served()


def test_the_weights_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptq_api.checkpoint.tensors import TensorStore

    read = TensorStore.read
    names: list[str] = []

    def noted(self: TensorStore, name: str) -> Any:
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(TensorStore, "read", noted)
    inspect(InspectSettings(model_path=str(folder), device="cpu"))
    assert names and all(name.endswith((".qzeros", ".scales", ".g_idx")) for name in names)
