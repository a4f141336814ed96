"""The compiled kernels, imported once. ext/bindings.cpp says what is in there. The environment's GPTQ_CUDA_MODULE names
another build of them, as `make gpu-portable` does; with its GPTQ_CUDA_OVERLAP=0 no kernel begins before the one before
it has ended (ext/common/launch.cuh), for tests."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
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


def no_code_reason(device_index: int) -> str:
    """Why `compiled_for` is 0 where there are kernels, for people."""
    import torch

    if not cuda.device_count():  # torch, built with another CUDA, sees one
        return without_driver(cuda.cuda_version)
    return without_code(torch.cuda.get_device_capability(device_index), cuda.architectures)


def without_code(capability: tuple[int, int], architectures: str) -> str:
    """`architectures`: what CMake was told, such as "80-real,90-real,120"."""
    said = f"compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        name = "Turing" if capability == (7, 5) else {7: "Volta", 6: "Pascal", 5: "Maxwell"}.get(capability[0], "older")
        return f"{said} ({name}); the kernels need 8.0 (Ampere) or later. --device cpu has kernels of its own"
    numbers = sorted({int(re.sub(r"\D.*", "", part)) for part in architectures.split(",")})
    compiled = ", ".join(f"{number // 10}.{number % 10}" for number in numbers)
    return (
        f"{said}; the kernels here were compiled for {compiled}. Install again from source with nvcc on PATH and "
        f"CMAKE_ARGS=-DGPTQ_API_ARCHS={capability[0]}{capability[1]}"
    )


def without_driver(cuda_version: int) -> str:
    """`cuda_version`: 1000 * major + 10 * minor, of the runtime in the kernels."""
    release = f"{cuda_version // 1000}.{cuda_version % 1000 // 10}"
    return (
        f"the kernels were built with CUDA {release}, and this machine's driver is older; update it, or install again "
        "with an older nvcc on PATH (12.8 or later)"
    )
