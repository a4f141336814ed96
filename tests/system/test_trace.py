"""`--trace FILE`: every step of the engine as a line, and tools/replay.py, which runs them again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gptq_api.demo import DEMO_PATH
from gptq_api.engine.trace import read_trace
from tests.support.commands import Commands
from tests.support.server import Server, chat_body
from tools import replay

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of six clients at once, one of them sampling three answers."""
    path = tmp_path_factory.mktemp("trace") / "steps.jsonl"
    path.write_text("an older one\n" * 1000)
    with (
        Server("--trace", str(path), "--max-num-seqs", "4", "--num-blocks", "200", "--speculate", "auto") as server,
        ThreadPoolExecutor(6) as pool,
    ):
        bodies = [chat_body(f"Count to {i}.", temperature=i % 2, seed=i, n=3 if i == 5 else 1) for i in range(6)]
        replies = list(pool.map(lambda body: server.post("/v1/chat/completions", body).json(), bodies))
        assert all("choices" in reply for reply in replies)
        for _ in range(2):  # the second time it is drafted
            reply = server.post("/v1/chat/completions", chat_body("What is GPTQ?", temperature=0, max_tokens=40)).json()
            assert "choices" in reply
    return path


def test_every_token_of_every_answer_is_in_it(trace: Path) -> None:
    head, steps = read_trace(trace)
    assert (head.model_path, head.device, head.max_num_seqs, head.num_blocks) == ("demo", "cpu", 4, 200)
    found = list(steps)
    assert sum(len(traced.step.admitted) for traced in found) >= 8, "eight sequences, some of them perhaps twice"
    at = 0.0
    for traced in found:
        assert traced.at_s >= at and 0 < traced.launch_ms <= traced.total_ms
        assert len(traced.sampled.tokens) == sum(traced.sampled.num_tokens)
        for entry, (most, num) in enumerate(zip(traced.step.num_sampled, traced.sampled.num_tokens, strict=True)):
            assert num == most or (entry in traced.step.drafts and 0 < num < most)
        at = traced.at_s
    assert any(traced.step.drafts for traced in found)
    assert {seat for traced in found for seat in traced.step.seats} == {0, 1, 2, 3}


def test_a_replay_samples_the_same_tokens(trace: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "replay.py"), str(trace), "--num-threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["steps"] == sum(1 for _ in read_trace(trace)[1])
    assert result["tokens"] == result["same_tokens"] > 50
    assert result["median_ms"] > 0 and result["recorded_median_ms"] > 0


def test_a_replay_follows_a_text_that_was_drafted_otherwise(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on another device: the recorded text goes on, whatever is sampled now."""
    head, *lines = trace.read_bytes().splitlines()
    other = [json.loads(line) for line in lines]
    changed = next(line for line in other if line["step"]["drafts"] and sum(line["sampled"]["num_tokens"]) > 3)
    for entry, drafts in changed["step"]["drafts"].items():  # the first is wrong now, and right as it was recorded
        place = sum(changed["sampled"]["num_tokens"][: int(entry)])
        drafts[0] = changed["sampled"]["tokens"][place] = drafts[0] ^ 1
    path = tmp_path / "other.jsonl"
    path.write_bytes(b"\n".join([head, *(json.dumps(line).encode() for line in other)]) + b"\n")
    assert replay.main([str(path), "--num-threads", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == len(lines) and result["tokens"] * 0.5 < result["same_tokens"] < result["tokens"]


def test_what_is_no_trace_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("{}\n")
    for path, words in ((wrong, "is not a trace"), (tmp_path / "none", "No such file")):
        assert replay.main([str(path)]) == 1 and words in capsys.readouterr().err


def test_a_trace_that_cannot_be_written_is_told_before_the_model_is_read(commands: Commands, tmp_path: Path) -> None:
    """Here one that cannot be. Where it is the model that is wrong, the last trace stays."""
    broken = tmp_path / "broken"
    shutil.copytree(DEMO_PATH, broken)
    (weights,) = broken.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    last = tmp_path / "last.jsonl"
    last.write_text("a trace\n")
    status, log = commands.refused("--model-path", str(broken), "--trace", str(last))
    assert status == 1 and weights.name in log and last.read_text() == "a trace\n"
    folder = tmp_path / "no" / "such" / "folder"
    status, log = commands.refused("--model-path", str(broken), "--trace", str(folder))
    assert status == 1
    assert "--trace" in log and "cannot be written: No such file" in log
    (sentence,) = [line for line in log.splitlines() if " loading " not in line]
    assert sentence.startswith("gptq-api serve: ") and sentence.isprintable()
