"""What prefill attention says before it runs; its results are in test_prefill_attention_cuda.py."""

from __future__ import annotations

import importlib.util
import shutil
from importlib.machinery import ModuleSpec

import pytest

from gptq_api.kernels import prefill_attention


def test_a_missing_triton_or_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "needs triton" in (prefill_attention.unavailable_reason() or "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "install gcc" in (prefill_attention.unavailable_reason() or "")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/clang" if name == "clang" else None)
    assert prefill_attention.unavailable_reason() is None


def test_caches_it_does_not_hold_are_refused_by_name() -> None:
    assert prefill_attention.refusal(128, 16) is None
    assert "head dimension 112" in (prefill_attention.refusal(112, 16) or "")
    assert "blocks of 24 tokens" in (prefill_attention.refusal(128, 24) or "")
    assert "blocks of 4 tokens" in (prefill_attention.refusal(128, 4) or "")
