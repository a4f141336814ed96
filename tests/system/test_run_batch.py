"""`gptq-api run-batch`: a file of requests becomes one of answers, also when it is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.batches import check_counted, count_to, counting, jsonl, request
from tests.support.commands import Commands
from tests.support.server import ONE_THREAD, chat_body, wait_for

Run = Callable[..., subprocess.CompletedProcess[str]]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "gptq_api", "run-batch", *args]


@pytest.fixture
def run(commands: Commands) -> Run:
    """`run-batch` with these arguments, to its end."""
    return lambda *args: commands.run("run-batch", *args, *ONE_THREAD, seconds=110)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_endpoint_and_every_refusal_in_the_order_of_the_requests(run: Run, tmp_path: Path) -> None:
    lines = [
        request("chat", count_to(3)),
        request("text", {"prompt": "1, 2,", "max_tokens": 4}, "/v1/completions"),
        request("wrong", count_to(3, temperature="hot")),
        request("response", {"input": "Hello", "max_output_tokens": 4}, "/v1/responses"),
        request("message", chat_body(max_tokens=4), "/v1/messages"),
        request("other", count_to(3, model="gpt-9")),
        request("alias", count_to(3, model="gpt-5")),
    ]
    (tmp_path / "in.jsonl").write_bytes(jsonl(lines))
    out = tmp_path / "out.jsonl"
    done = run(str(tmp_path / "in.jsonl"), str(out), "--model-alias", "gpt-5")
    assert done.returncode == 0, done.stderr
    answers = read(out)
    assert [line["custom_id"] for line in answers] == [line["custom_id"] for line in lines]
    assert [line["response"]["status_code"] for line in answers] == [200, 200, 400, 200, 200, 404, 200]
    objects = [line["response"]["body"].get("object") for line in answers]
    assert objects[:2] + objects[3:4] == ["chat.completion", "text_completion", "response"]
    assert answers[4]["response"]["body"]["type"] == "message"
    assert answers[2]["response"]["body"]["error"]["param"] == "temperature"
    assert f"7 requests answered: {out}" in done.stderr and "failed=2" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"], "nothing is left over"
    again = run(str(tmp_path / "in.jsonl"), str(out))
    assert again.returncode == 1 and f"{out} exists already; remove it" in again.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_same_command_goes_on_where_it_was_stopped(run: Run, number: int, tmp_path: Path) -> None:
    asked, out = counting(150), tmp_path / "out.jsonl"
    (tmp_path / "in.jsonl").write_bytes(jsonl(asked))
    args = (str(tmp_path / "in.jsonl"), str(out))
    process = subprocess.Popen(command(*args, *ONE_THREAD), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: num_answered(out) >= 20 or process.poll() is not None, 90)
    os.kill(process.pid, number)
    told = process.communicate(timeout=60)[1]
    before = num_answered(out)
    assert 20 <= before < 150 and not out.exists(), told
    if number == signal.SIGINT:
        assert process.returncode == 130 and "the same command goes on with what is missing" in told, told
    (tmp_path / "other.jsonl").write_bytes(jsonl(counting(2)))
    other = run(str(tmp_path / "other.jsonl"), str(out))
    assert other.returncode == 1 and "begun with other requests" in other.stderr
    done = run(*args)
    assert done.returncode == 0, done.stderr
    check_counted(asked, read(out))
    assert not out.with_name("out.jsonl.partial").exists()


def num_answered(out: Path) -> int:
    """As another process sees it."""
    database = out.with_name("out.jsonl.partial") / "batches.sqlite3"
    if not database.exists():
        return 0
    try:
        db = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
        (num,) = db.execute("SELECT count(*) FROM answers").fetchone()
        db.close()
    except sqlite3.OperationalError:  # it is being made
        return 0
    return int(num)


def test_a_file_with_mistakes_is_told_by_its_lines_before_anything_is_loaded(run: Run, tmp_path: Path) -> None:
    lines = [json.dumps(line).encode() for line in counting(3)]
    lines[1] = b"{"
    lines.append(json.dumps(request("a", {}, "/v1/embeddings")).encode())
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"\n".join(lines))
    done = run(str(file), str(tmp_path / "out.jsonl"))
    assert done.returncode == 1 and "loading" not in done.stderr
    assert f"{file}: line 2: This line is not parseable as valid JSON" in done.stderr
    assert "line 4: 'url' must be one of /v1/chat/completions" in done.stderr
    assert not list(tmp_path.glob("out*")), "and nothing is begun"


ENGINE_DIES = """
import os, sys
if "gptq_api.engine.process" in sys.orig_argv:
    import gptq_api.runner.cpu.native_sampler as sampler
    sample = sampler.sample
    def deadly(logits, seats, masks=None):
        if any(seat.params.seed == 666 for seat in seats):
            os._exit(9)
        return sample(logits, seats, masks)
    sampler.sample = deadly
"""


def test_a_request_that_kills_engines_takes_no_other_with_it(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "sitecustomize.py").write_text(ENGINE_DIES)
    asked = counting(12)
    asked[4]["body"]["seed"] = 666
    (tmp_path / "in.jsonl").write_bytes(jsonl(asked))
    out = tmp_path / "out.jsonl"
    path = os.pathsep.join(filter(None, [str(tmp_path / "code"), os.environ.get("PYTHONPATH")]))
    args = command(str(tmp_path / "in.jsonl"), str(out), *ONE_THREAD)
    done = subprocess.run(
        args, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    answers = read(out)
    assert answers[4]["response"]["status_code"] == 503
    assert answers[4]["response"]["body"]["error"]["code"] == "engine_dead"
    check_counted(asked[:4] + asked[5:], answers[:4] + answers[5:])
