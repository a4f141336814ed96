"""What the benchmark scripts compute from what they measure."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gptq_api.engine.core import Engine
from gptq_api.kernels import gemm
from gptq_api.runner.load import load_runner
from gptq_api.runner.options import LoadOptions
from gptq_api.scheduler.blocks import BlockManager
from gptq_api.scheduler.scheduler import Scheduler
from gptq_api.step import PromptCosts
from gptq_api.types import Add, SamplingParams, pack_ids
from tests.support.server import Server

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module(request.param)


@pytest.mark.parametrize("script", ["decode"], indirect=True)
def test_the_gap_is_between_kernels_with_the_copy_of_inputs_in_it(script: ModuleType) -> None:
    events = [
        (0.0, 10.0, "gemm"),
        (8.0, 14.0, "sample"),  # overlaps: the later end counts
        (14.5, 15.0, "Memcpy DtoH (Device -> Pinned)"),
        (15.5, 16.0, "Memcpy HtoD (Pinned -> Device)"),
        (17.0, 30.0, "gemm"),
        (31.0, 33.0, "sample"),
        (33.5, 34.0, "Memcpy HtoD (Pinned -> Device)"),
        (35.5, 36.0, "gemm"),
    ]
    assert script.step_gaps(events) == [3.0, 2.5]
    assert script.step_gaps([(0.0, 1.0, "Memcpy HtoD (Pinned -> Device)"), (2.0, 3.0, "gemm")]) == []


@pytest.mark.parametrize("script", ["serve"], indirect=True)
def test_the_share_is_of_the_same_load(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "decode.json"
    file.write_text(
        '{"llama-7b": {"rows": [{"part": "decode", "batch": 8, "new_tokens": 128, "tok_s": 1.0},'
        '{"part": "closed", "batch": 8, "prompt": 128, "new_tokens": 128, "tok_s": 500.0}]}}'
    )
    parser_like = type("Args", (), {"in_process": file, "prompt_tokens": 128, "max_tokens": 128})
    assert script.in_process_rate(parser_like, "llama-7b", 8) == 500.0
    assert script.in_process_rate(parser_like, "llama-7b", 32) is None
    assert script.in_process_rate(parser_like, "llama-13b", 8) is None


def test_the_host_is_measured_through_real_processes(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    command = [sys.executable, str(BENCHMARKS / "host.py"), "--streams", "1,6", "--prompt-tokens", "20"]
    subprocess.run([*command, "--max-tokens", "8", "--rounds", "1", "--out", str(out)], check=True, timeout=60)
    for row, streams in zip(json.loads(out.read_text())["rows"], (1, 6), strict=True):
        assert row["streams"] == streams and row["api_us_per_token"] > 0
        assert row["ttft_ms"]["p50"] >= 3.2, "a step of the simulated device takes as long"
        # A reader who gets a processor late has tokens together that came one after another.
        assert row["inter_token_ms"]["mean"] > 0 and 0 < row["share"] < 1


def test_answers_are_timed_beside_a_long_prompt_and_no_longer(tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    with Server("--speculate", "off", "--max-num-batched-tokens", "64") as server:
        command = [sys.executable, str(BENCHMARKS / "serve.py"), "--url", f"http://127.0.0.1:{server.port}/v1"]
        command += ["--concurrency", "", "--prompt-tokens", "16", "--beside", "900", "--out", str(out)]
        subprocess.run([*command, "--max-tokens", "900"], check=True, timeout=60)
        too_short = subprocess.run([*command, "--max-tokens", "8"], capture_output=True, text=True, timeout=60)
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["mode"], row["failed"], row["prompt_tokens"], row["answers"]) == ("beside", 0, 900, 4)
    # steps of at most 64 rows: the prompt takes 15 of them and more, each with a token of every answer
    assert row["inter_token_ms"]["mean"] * 10 < row["ttft_ms"]["p50"]
    assert too_short.returncode == 1 and "more --max-tokens" in too_short.stderr.splitlines()[-1]
    assert "Traceback" not in too_short.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available")
def test_the_gemm_is_timed_in_every_format(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gemm.py"), "--quick", "--commit", "a test", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=90)
    records = json.loads(next(tmp_path.glob("gemm-*.json")).read_text())["records"]
    ours = [r for r in records if r["kernel"] == "gptq_api" and r["M"] in (1, 64, 1024)]
    linears = {(r["K"], r["N"], r["M"], r["sym"], r["act_order"]) for r in ours if r["K"]}
    assert len(linears) == 4 * 3 * 3, "four linears at three M: symmetric, asymmetric, act-order"
    assert {(r["M"], r["act_order"]) for r in ours if not r["K"]} == {
        (m, o) for m in (1, 64, 1024) for o in (False, True)
    }
    assert all(r["us"] > 1 and r["cublas_us"] > 1 and r["sm_mhz"] > 100 for r in records)


@pytest.mark.parametrize("script", ["decode"], indirect=True)
def test_answers_last_until_the_last_prompt_is_through(script: ModuleType) -> None:
    runner = load_runner(LoadOptions(device="cpu", num_threads=1, max_num_seqs=4, num_blocks=200))
    given = []

    def run(new: int) -> list[Any]:
        engine: Engine[Any] = Engine(runner, Scheduler(BlockManager(200, runner.block_size), 4, 16, False))
        for i in range(4):
            engine.add(Add(i, pack_ids([5 + i] * 60), (SamplingParams(max_tokens=new, temperature=0),)))
        steps: list[Any] = []
        while engine.has_work():
            out = engine.step()
            if out is not None:
                steps.append(script.Step(len(steps), len(out.tokens) // 4, out.stats.num_batched_tokens))
        given.append(new)
        return steps

    found = script.common_steps(run, 4, 4, lambda new: new < 400)
    assert found is not None and len(found[0]) > script.MIN_STEPS and found[1] == given[-1] > given[0] == 4
    assert script.common_steps(run, 4, 4, lambda new: new < 8) is None


@pytest.mark.parametrize("script", ["decode"], indirect=True)
def test_variants_of_one_commit_meet_in_one_file(script: ModuleType, tmp_path: Path) -> None:
    def save(variant: str, commit: str, value: float, **options: str) -> list[tuple[str, float]]:
        rows = [{"variant": variant, "part": "decode", "tok_s": value}]
        result = {"gpu": "A GPU", "model": "llama-7b", "options": options, "commit": commit, "rows": rows}
        script.save(result, tmp_path)
        name = " ".join(["llama-7b", *(f"{key}={value}" for key, value in options.items())])
        saved = json.loads((tmp_path / "decode-a-gpu.json").read_text())[name]["rows"]
        return [(row["variant"], row["tok_s"]) for row in saved]

    assert save("g128", "a", 1.0) == [("g128", 1.0)]
    assert save("fp16", "a", 2.0) == [("g128", 1.0), ("fp16", 2.0)]
    assert save("g128", "a", 3.0) == [("fp16", 2.0), ("g128", 3.0)]
    assert save("fp16", "b", 4.0) == [("fp16", 4.0)]
    assert save("fp16", "b", 5.0, kv_cache_dtype="fp8") == [("fp16", 5.0)]
    assert save("g128", "b", 6.0) == [("fp16", 4.0), ("g128", 6.0)]


@pytest.mark.parametrize("script", ["sampler"], indirect=True)
def test_commits_stand_beside_each_other(script: ModuleType, tmp_path: Path) -> None:
    for commit, value in (("a", 1), ("b", 2), ("a", 3)):
        script.save({"gpu": "A GPU", "commit": commit, "times": value}, tmp_path)
    runs = json.loads((tmp_path / "sampler-a-gpu.json").read_text())
    assert [(run["commit"], run["times"]) for run in runs] == [("b", 2), ("a", 3)]


@pytest.mark.gpu
@pytest.mark.skipif(not gemm.is_available(), reason=gemm.unavailable_reason() or "available")
def test_the_sampler_is_timed_and_its_texts_are_compared(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "sampler.py"), "--models", "demo", "--commit", "a test"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, timeout=90)
    (run,) = json.loads(next(tmp_path.glob("sampler-*.json")).read_text())
    assert all(row["us"] > 1 for row in run["times"])
    assert run["texts"][0]["same_alone_again"] == run["texts"][0]["texts"]


@pytest.mark.parametrize("script", ["attack"], indirect=True)
def test_the_table_of_attacks_is_up_to_date(script: ModuleType) -> None:
    table = script.table(json.loads(script.RESULT.read_text()))
    assert script.PART.holds(table), "run: python benchmarks/attack.py --page"
    assert table.count("\n| ") > len(script.ROWS)


def test_an_attack_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "attack.json"
    command = [sys.executable, str(BENCHMARKS / "attack.py"), "--rounds", "1", "--rows", "killed_engine_told"]
    subprocess.run([*command, "--out", str(out)], check=True, timeout=100)
    row = json.loads(out.read_text())["rows"]["killed_engine_told"]
    assert 0 < row["value"] < 20_000 and row["must"] == 200


@pytest.mark.parametrize("script", ["latency"], indirect=True)
def test_prompts_take_the_time_that_others_can_wait(script: ModuleType) -> None:
    """On the simulated device, where a step of 64 that decode takes 9 ms: whoever decodes waits 16 more for prompts,
    and a burst still has its first tokens sooner than with steps limited by their rows."""
    wave, users = script.LOADS["64 users, 128 tokens in and out"]
    felt, before = (script.load(wave, users, by_rows=by_rows) for by_rows in (False, True))
    assert felt.between_p99() < 26 < 55 < before.between_p99()
    assert felt.tokens_per_second > 0.99 * before.tokens_per_second
    long, users = script.LOADS["4 that decode beside a prompt of 30,000 tokens"]
    felt, before = (script.load(long, users, by_rows=by_rows) for by_rows in (False, True))
    assert felt.between_p99(range(4)) < 40 < 100 < before.between_p99(range(4))
    assert felt.first[4] < 1.1 * before.first[4]
    for off in (0.5, 2.0):  # what the device says is wrong, and the steps tell so
        said = PromptCosts(3.2, 0.037 * off, 1.9e-6 * off)
        assert script.load(long, users, said=said).between_p99(range(4)) < 42
    for burst in ("256 at once, the same", "256 at once, sampled lengths"):
        requests, users = script.LOADS[burst]
        felt, before = (script.load(requests, users, by_rows=by_rows) for by_rows in (False, True))
        assert script.p99(felt.first) < 0.95 * script.p99(before.first)
        assert felt.tokens_per_second > 0.99 * before.tokens_per_second
