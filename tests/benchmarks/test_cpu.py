"""benchmarks/cpu.py: what it computes from what it measures, and a run of it on a small shape."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gptq_api.bench import synthetic

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2100,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
}


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module("cpu")


@pytest.fixture
def cpu_server(cpu: ModuleType) -> ModuleType:
    return importlib.import_module("cpu_server")


def test_the_rate_is_that_of_the_time_in_which_all_answer(cpu_server: ModuleType) -> None:
    early = cpu_server.Call(arrivals=[1.0, 2.0, 3.0, 4.0], completion_tokens=4)
    late = cpu_server.Call(arrivals=[2.5, 3.0, 4.0, 5.0, 6.0], completion_tokens=5)
    assert cpu_server.common_rate([early, late]) == pytest.approx((2 + 2) / 1.5)
    one_by_one = [cpu_server.Call(arrivals=[at, at + 1], completion_tokens=2) for at in (1.0, 3.0)]
    assert cpu_server.common_rate(one_by_one) == pytest.approx(3 / 3)
    silent = cpu_server.Call(arrivals=[1.0, 3.0], completion_tokens=4)  # every other token has no text of its own
    assert cpu_server.common_rate([silent]) == pytest.approx(1.0)


@pytest.mark.server
def test_a_run(cpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(synthetic.SHAPES, "small", SMALL)
    monkeypatch.setattr(cpu.processor, "read_bandwidth", lambda: {"huge_pages": 40.0, "small_pages": 30.0})
    assert cpu.main(["--shapes", "small", "--repeats", "1", "--work", str(tmp_path), "--out", str(tmp_path)]) == 0
    result = json.loads(next(tmp_path.glob("cpu-*.json")).read_text())["small"]
    rows = {(row["what"], row.get("batch", row.get("time"))): row for row in result["rows"]}
    assert set(rows) == {
        *(("decode", batch) for batch in (1, 8, 16)),
        *(("prefill", 1), ("start to ready", "first"), ("start to ready", "second")),
    }
    decode = rows["decode", 8]
    assert decode["bytes_a_step"] > 2 * 4 * 256 * 384 // 2 + 2100 * 256, "two layers and the head"
    share = decode["tok_s"] / 8 * decode["bytes_a_step"] / 40e9
    assert decode["share_of_bandwidth"] == pytest.approx(share, abs=1e-3)
    assert cpu.table("small", _beside(result)).splitlines()[4].endswith("| 12.0 | 10% | 2.00 | 24.0 | 1.00 |")
    assert not any("ratio" in key for row in result["rows"] for key in row), "there was no llama.cpp"
    assert cpu.table("small", result).count("\n| ") == 7


def _beside(result: dict[str, Any]) -> dict[str, Any]:
    """As if two builds of llama.cpp had been measured."""
    theirs = {"tok_s": 12.0, "share_of_bandwidth": 0.1, "ratio": 2.0}
    other = {"tok_s": 24.0, "share_of_bandwidth": 0.2, "ratio": 1.0}
    more = {f"llama_cpp_{key}": value for key, value in theirs.items()}
    more |= {f"llama_cpp_amx_{key}": value for key, value in other.items()}
    return result | {"rows": [row if "seconds" in row else row | more for row in result["rows"]]}


def test_memory_is_read_in_both_kinds_of_pages(cpu: ModuleType) -> None:
    found = cpu.processor.read_bandwidth(num_bytes=2**24, rounds=1)
    assert set(found) == {"huge_pages", "small_pages"} and all(value > 0.1 for value in found.values())
    facts = cpu.processor.facts()
    assert 1 <= facts["cores"] <= facts["threads"] <= facts["threads_of_the_machine"] and facts["cpu"]


def test_pages_have_the_figures_of_the_files(cpu: ModuleType) -> None:
    assert cpu.SENTENCE.holds(cpu.sentence()) and cpu.TABLES.holds(cpu.tables()), "run: python benchmarks/cpu.py --page"
