"""`gptq-api bench serve` against the demo: both loops, lengths, files; and servers that cannot be measured."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from gptq_api.bench.load import LONGEST, SHAREGPT, SHORTEST, Traffic
from tests.support.server import Server


def bench(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gptq_api", "bench", "serve", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


def test_both_loops_as_table_json_and_png(server: Server, tmp_path: Path) -> None:
    file, png = tmp_path / "serve.json", tmp_path / "serve.png"
    fixed = ("--lengths", "fixed", "--prompt-tokens", 40, "--max-tokens", 12, "--num-requests", 6)
    done = bench("--url", server.url, *fixed, "--concurrency", "1,3", "--rate", 20, "--json", file, "--png", png)
    assert done.returncode == 0, done.stderr
    for words in (
        "1 users",
        "3 users",
        "20 requests/s",
        "tokens/s",
        "between tokens",
        "fixed lengths",
        "measured from",
    ):
        assert words in done.stdout, words
    assert "3 users: 6 of 6" in done.stderr
    result = json.loads(file.read_text())
    assert result["model"] == "demo" and result["load"]["ignore_eos"] is True
    assert [row["mode"] for row in result["rows"]] == ["closed", "closed", "open"]
    for row in result["rows"]:
        assert (row["requests"], row["failed"], row["output_tokens"]) == (6, 0, 6 * 12)
        assert 0.7 < row["prompt_tokens"] / (6 * 40) < 1.3, "words are counted out by what a probe found"
        assert 0 < row["ttft_ms"]["p50"] <= row["ttft_ms"]["p99"] <= row["e2e_ms"]["p99"]
        assert row["output_tokens_per_s"] > 0 and row["client_share_of_a_core"] > 0
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_lengths_are_those_of_sharegpt_and_fit_the_context() -> None:
    def shape(longest: int | None) -> Traffic:
        return Traffic("m", "sharegpt", 0, 0, 0.0, 3, longest=longest)

    bodies = shape(None).bodies(4000)
    prompts = [len(body["messages"][0]["content"].split()) for body in bodies]
    answers = [body["max_tokens"] for body in bodies]
    for lengths, (mean, _) in zip((prompts, answers), SHAREGPT, strict=True):
        assert min(lengths) >= SHORTEST and max(lengths) <= LONGEST
        assert 0.7 * mean < statistics.fmean(lengths) < 1.1 * mean  # the long ones are cut
    assert bodies == shape(None).bodies(4000)
    for body in shape(256).bodies(500):
        assert len(body["messages"][0]["content"].split()) + body["max_tokens"] <= 256


def test_a_server_with_a_key(strict_server: Server) -> None:
    small = ("--concurrency", 1, "--num-requests", 2, "--lengths", "fixed", "--max-tokens", 3)
    without = bench("--url", strict_server.url, *small)
    assert without.returncode == 1 and len(without.stderr.splitlines()) == 1
    assert "401" in without.stderr and "--api-key KEY" in without.stderr
    done = bench("--url", strict_server.url, "--api-key", "first-key", *small)
    assert done.returncode == 0 and "strict at http" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (("--url", "http://127.0.0.1:9/v1"), 1, "http://127.0.0.1:9/v1 cannot be reached"),
        (("--url", "nonsense"), 1, "nonsense is not an address"),
        ((), 2, "--url is missing"),
        (("--url", "x", "--concurrency", "0"), 2, "whole numbers from 1 to 4096"),
        (("--url", "x", "--rate", "0"), 2, "numbers above 0"),
        (("--url", "x", "--max-tokens", "5", "--lengths", "sharegpt"), 2, "--max-tokens does nothing beside --lengths"),
        (("--url", "http://127.0.0.1:9/v1", "--png", "/no/such/x.png"), 1, "/no/such/x.png cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(args: tuple[str, ...], status: int, words: str) -> None:
    done = bench(*args)
    assert done.returncode == status and words in done.stderr and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("gptq-api bench serve: ")
