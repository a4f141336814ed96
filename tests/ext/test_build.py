"""The extension's sources and its build: without nvcc, or switched off, an install succeeds and says why the kernels
are missing. What nvcc makes of them: test_budgets.py."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ext.sass import EXT

FOLDERS = {"cpu", "common", "gemv", "gemm", "attention", "head", "exchange", "ops", "sampler"}
MAX_COLUMNS = 140


def sources() -> dict[str, str]:
    """path in ext/ -> text, but for what Python keeps of the build backend."""
    files = (path for path in sorted(EXT.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(EXT)): path.read_text() for path in files}


def test_every_file_stands_in_a_folder_of_its_family() -> None:
    top = {name for name in sources() if "/" not in name}
    assert top == {"CMakeLists.txt", "README.md", "bindings.cpp", "build_backend.py"}
    assert {name.split("/")[0] for name in sources() if "/" in name} == FOLDERS
    for name in sources().keys() - top:
        kinds = "cpp|h|cmake" if name.startswith("cpu/") else "cu|cuh|h"
        assert re.fullmatch(rf"\w+/\w+\.({kinds})", name), name


def test_no_line_is_longer_than_a_screen() -> None:
    long = [
        f"{name}:{number}"
        for name, text in sources().items()
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > MAX_COLUMNS
    ]
    assert not long


def test_includes_begin_at_ext_and_a_host_header_is_one_that_the_bindings_include() -> None:
    files = sources()
    included = {name: set(re.findall(r'#include "([^"]+)"', text)) for name, text in files.items()}
    assert set().union(*included.values()) <= files.keys()
    headers = {name for name in files if name.endswith((".h", ".cuh"))}
    assert headers == set().union(*included.values())
    of_the_device = {name for name in headers if name.endswith(".h") and not name.startswith("cpu/")}
    assert included["bindings.cpp"] == of_the_device
    assert all(other.startswith("cpu/") for name in files if name.startswith("cpu/") for other in included[name])


def test_the_bindings_name_their_arguments_in_the_order_of_the_functions() -> None:
    """Python may call with keywords, so a name that stood beside another's place would pass a wrong address."""
    text = sources()["bindings.cpp"]
    parameters = {
        name: re.findall(r"(\w+)(?:,|$)", listed)
        for name, listed in re.findall(r"^void (\w+)\(([^)]*)\) \{", text, re.MULTILINE)
    }
    named = {
        function: re.findall(r'"(\w+)"_a', names)
        for function, names in re.findall(r"m\.def\(\"\w+\", &(\w+), free_gil(, [^)]*)\);", text)
    }
    assert len(named) >= 12
    assert named == {name: parameters[name] for name in named}


def configure(tmp_path: Path, cuda: str, compiler: str, cpu: str = "off") -> subprocess.CompletedProcess[str]:
    """Configure only, with `compiler` as the only nvcc that CMake may find, and no C++ compiler."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    command = ["cmake", "-S", str(EXT), "-B", str(tmp_path), f"-DCMAKE_CUDA_COMPILER={compiler}"]
    command.append("-DCMAKE_CXX_COMPILER=")
    environment = {"PATH": "/usr/bin:/bin", "GPTQ_API_CUDA": cuda, "GPTQ_API_CPU": cpu}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_without_a_compiler_the_install_succeeds_and_says_what_to_do(tmp_path: Path) -> None:
    done = configure(tmp_path, "auto", "")
    assert done.returncode == 0, done.stderr
    said = re.sub(r"\s+", " ", done.stderr)
    assert "WITHOUT the CUDA kernels" in said and "put nvcc on PATH" in said


def test_on_without_a_compiler_fails_with_the_same_words(tmp_path: Path) -> None:
    done = configure(tmp_path, "on", "")
    assert done.returncode != 0
    assert "no nvcc was found" in done.stderr


def test_off_asks_for_nothing(tmp_path: Path) -> None:
    done = configure(tmp_path, "off", "")
    assert done.returncode == 0, done.stderr
    assert "GPTQ_API_CUDA=off" in done.stdout


def test_without_a_cxx_compiler_the_install_succeeds_and_says_what_to_do(tmp_path: Path) -> None:
    done = configure(tmp_path, "off", "", "auto")
    assert done.returncode == 0, done.stderr
    said = re.sub(r"\s+", " ", done.stderr)
    assert "WITHOUT the CPU kernels" in said and "apt install g++" in said
    done = configure(tmp_path, "off", "", "on")
    assert done.returncode != 0 and "no C++ compiler was found" in done.stderr


def test_an_unknown_value_is_refused(tmp_path: Path) -> None:
    done = configure(tmp_path, "maybe", "")
    assert done.returncode != 0 and "one of auto, on, off" in done.stderr


def test_the_wrappers_import_without_a_device_or_an_extension() -> None:
    """In an interpreter of its own, with the extension hidden."""
    program = (
        "import sys; sys.modules['gptq_api._cuda'] = None\n"
        "from gptq_api.kernels import gemm\n"
        "assert not gemm.is_available()\n"
        "assert 'nvcc on PATH' in gemm.unavailable_reason()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
