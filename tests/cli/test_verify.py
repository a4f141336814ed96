"""`gptq-api verify`: agreement where there is any, and where a checkpoint or the arithmetic is broken, where."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_api.cli.main import main
from gptq_api.kernels import gemm
from gptq_api.runner.load import load_runner
from gptq_api.runner.options import LoadOptions
from gptq_api.step import Step
from gptq_api.verify.comparison import compare, limit_of
from gptq_api.verify.ours import answer
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.text_tokenizers import byte_level

SMALL = ("--device", "cpu", "--num-threads", "1", "--prompt-tokens", "24", "--num-tokens", "8")
Verify = Callable[..., subprocess.CompletedProcess[str]]
RECIPE = Recipe(vocab_size=512, act_order=True, sym=False, num_layers=3, tie=True)


def verify(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gptq_api", "verify", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


@pytest.fixture
def verify_here(capsys: pytest.CaptureFixture[str]) -> Verify:
    """The same in this interpreter, which has imported transformers."""

    def verify(*args: object) -> subprocess.CompletedProcess[str]:
        words = ["verify", *map(str, args)]
        threads = torch.get_num_threads()
        try:
            status = main(words)
        finally:
            torch.set_num_threads(threads)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, status, said.out, said.err)

    return verify


def checkpoint(folder: Path, recipe: Recipe = RECIPE) -> Path:
    return byte_level(write_checkpoint(folder, random_model(recipe)))


def test_the_demo_is_what_transformers_says() -> None:
    done = verify("--json", *SMALL)
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert "4-bit GPTQ" in facts["runs_on"] and facts["reference"] == "transformers, float32, cpu"
    assert len(facts["texts"]) == 3
    for text in facts["texts"]:
        assert 0 < text["largest_error"] < facts["limit"]
        assert text["greedy_tokens"] >= 1 and not [p for p in text["partings"] if not p["is_tie"]]


def test_a_text_gets_no_block_beyond_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA there is no room for one."""
    runner = load_runner(LoadOptions(model_path="demo", device="cpu", num_threads=1, num_blocks=8, max_model_len=32))
    ends, launch = list[int](), runner.launch

    def noted(step: Step) -> Any:
        ends.extend(blocks.first + len(blocks.block_ids) for blocks in step.new_blocks)
        return launch(step)

    monkeypatch.setattr(runner, "launch", noted)
    answered = answer(runner, list(range(100, 124)), 8)
    assert len(answered.token_ids) <= 32 and max(ends) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available")
def test_the_demo_on_the_gpu_is_what_transformers_says() -> None:
    done = verify("--json", "--device", "cuda")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(text["greedy_tokens"] >= 1 for text in json.loads(done.stdout)["texts"])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "mistral"])
def test_every_family_agrees_in_float32(family: str, tmp_path: Path, verify_here: Verify) -> None:
    more = {"phi3": {"pad_token_id": 0}}.get(family, {})
    folder = checkpoint(tmp_path / "m", replace(RECIPE, family=family, more_config=more, tie=False))
    done = verify_here(folder, "--dtype", "float32", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "off by 0.00% at most" in done.stdout


def test_a_checkpoint_broken_on_purpose_is_told_by_layer(tmp_path: Path, verify_here: Verify) -> None:
    folder = checkpoint(tmp_path / "m", replace(RECIPE, float_dtype=torch.float32))
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.input_layernorm.weight"][:] = 3e38
    save_file(tensors, file, metadata={"format": "pt"})
    done = verify_here(folder, *SMALL)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "transformers' numbers are not finite either, from layer 1 on" in done.stderr


def test_logits_that_part_are_told_by_position() -> None:
    generator = torch.Generator().manual_seed(1)
    theirs = torch.randn(12, 40, generator=generator)
    ids = [3, *theirs.argmax(1)[:-1].tolist()]
    same = compare(theirs + 1e-4, theirs, ids, 6)
    assert same.largest_error < 1e-5 and same.same_best == 12 and same.greedy_tokens == 6 and not same.partings
    ours = theirs.clone()
    ours[7] = theirs[7].flip(0)
    broken = compare(ours, theirs, ids, 6)
    assert broken.worst_position == 7 and broken.largest_error > limit_of("bfloat16", True)
    assert broken.mean_divergence > 0.01
    ids[9] = int(theirs[8].argmin())
    (parting,) = compare(theirs, theirs, ids, 6).partings
    assert (parting.position, parting.ours, parting.is_tie) == (9, ids[9], False)
    assert parting.theirs == int(theirs[8].argmax()) and parting.margin > 1
    ours[2] = torch.nan
    assert compare(ours, theirs, ids, 6).largest_error == float("inf")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ("--prompt-tokens", "2000"),
            "the model's context holds 1024 tokens, and --prompt-tokens 2000 with --num-tokens",
        ),
        (("/no/such/model",), "/no/such/model"),
        (("--text", "/no/such/text"), "/no/such/text"),
        (("--num-tokens", "0"), "--num-tokens"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(args: tuple[str, ...], words: str, verify_here: Verify) -> None:
    done = verify_here("--device", "cpu", *args)
    assert done.returncode in (1, 2) and words in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout
