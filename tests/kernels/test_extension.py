"""What people are told where the CUDA kernels have no code for their GPU."""

from __future__ import annotations

import pytest

from gptq_api.kernels.extension import without_code, without_driver

BUILT = "80-real,90-real,100-real,120"


@pytest.mark.parametrize(
    ("capability", "name"), [((7, 5), "7.5 (Turing)"), ((7, 0), "7.0 (Volta)"), ((6, 1), "6.1 (Pascal)")]
)
def test_an_older_gpu_is_named_with_what_the_kernels_need(capability: tuple[int, int], name: str) -> None:
    said = without_code(capability, BUILT)
    assert (
        said
        == f"compute capability {name}; the kernels need 8.0 (Ampere) or later. --device cpu has kernels of its own"
    )


def test_a_gpu_that_nobody_compiled_for_is_told_how_to() -> None:
    assert without_code((11, 0), BUILT) == (
        "compute capability 11.0; the kernels here were compiled for 8.0, 9.0, 10.0, 12.0. "
        "Install again from source with nvcc on PATH and CMAKE_ARGS=-DGPTQ_API_ARCHS=110"
    )
    assert "compiled for 8.9. " in without_code((8, 6), "89-real") and "ARCHS=86" in without_code((8, 6), "89-real")
    assert "compiled for 9.0. " in without_code((8, 0), "90a-real,90-virtual")


def test_a_driver_older_than_the_runtime_is_told_as_what_it_is() -> None:
    assert "built with CUDA 12.8, and this machine's driver is older" in without_driver(12080)
    assert "built with CUDA 13.0" in without_driver(13000)
