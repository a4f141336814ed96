"""The compiled kernels, imported once. ext/bindings.cpp says what is in there. The environment's GPTQ_CUDA_MODULE names
another build of them, as `make gpu-portable` does."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from functools import cache
from typing import Any


def _load() -> Any:
    path = os.environ.get("GPTQ_CUDA_MODULE")
    if not path:
        from gptq_api import _cuda  # type: ignore[attr-defined, unused-ignore]

        return _cuda
    loader = importlib.machinery.ExtensionFileLoader("gptq_api._cuda", path)
    spec = importlib.util.spec_from_loader("gptq_api._cuda", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


try:
    cuda: Any = _load()
except ImportError as error:  # installed without nvcc: a reason to give, not to fail
    cuda = None
    MISSING = f"gptq-api was installed without its CUDA kernels ({error}); install again with nvcc on PATH"
else:
    MISSING = ""
    """why there are none, for people"""


@cache
def compiled_for(device_index: int) -> int:
    """For which architecture the code of the portable kernels was made that this device runs: 10 * major + minor, which
    may be less than the device's own. 0: there is none for it, or there are no kernels at all. It decides which kernels
    serve and how they are launched, so that code of 8.0 does on a newer device what it does on its own."""
    if cuda is None:
        return 0
    import torch

    with torch.cuda.device(device_index):
        return int(cuda.compiled_for())
