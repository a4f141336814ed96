"""The compiled kernels, imported once. ext/bindings.cpp says what is in there."""

from __future__ import annotations

from typing import Any

try:
    from gptq_api import _cuda as _module  # type: ignore[attr-defined, unused-ignore]
except ImportError as error:  # installed without nvcc: a reason to give, not to fail
    cuda: Any = None
    MISSING = f"gptq-api was installed without its CUDA kernels ({error}); install again with nvcc on PATH"
else:
    cuda = _module
    MISSING = ""
    """why there are none, for people"""
