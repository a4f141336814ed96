"""Triton's launcher, compiled beforehand: taken where there is no compiler, and only where it fits."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptq_api.kernels import launcher, prefill_attention

ROOT = Path(__file__).parents[2]
STAND_IN = """
import sys
import sysconfig
from pathlib import Path
from gptq_api.kernels import launcher
folder = Path(sys.argv[1])
driver = folder / "driver.o"
launcher._run("gcc", "-fPIC", "-w", "-c", *sys.argv[2:], "-o", str(driver))
launcher._stand_in_for_the_driver("gcc", driver, folder)
"""
LOAD = """
import sys
import sysconfig
from pathlib import Path
from gptq_api.kernels import launcher
launcher.PLACE = Path(sys.argv[1])
launcher.use_precompiled()
from triton.backends.nvidia.driver import CudaUtils
print(CudaUtils().launch.__name__)
"""
RUN = """
import sys
import sysconfig
from pathlib import Path
from gptq_api.kernels import launcher
launcher.PLACE = Path(sys.argv[1])
from tests.kernels.test_prefill_attention_cuda import Step
Step(((70, 130), (1, 1)), 4, 2, 128).check()
print("as torch")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the launcher of this Triton."""
    if importlib.util.find_spec("triton") is None or launcher.compiler() is None:
        pytest.skip("needs triton and a C compiler")
    folder = tmp_path_factory.mktemp("launcher")
    done = subprocess.run([sys.executable, launcher.__file__, folder], capture_output=True, text=True, timeout=100)
    if "take 3.7 or later" in done.stderr:
        pytest.skip("this triton compiles a launcher for every kernel")
    assert done.returncode == 0, done.stderr
    assert [*map(str, folder.iterdir())] == [done.stdout.strip()]
    return folder


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)


@pytest.mark.usefixtures("no_compiler")
def test_where_there_is_one_no_compiler_is_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "PLACE", folder)
    assert launcher.precompiled() is not None and prefill_attention.unavailable_reason() is None
    monkeypatch.setattr(launcher, "PLACE", folder / "nowhere")
    assert "install gcc" in (prefill_attention.unavailable_reason() or "")


def test_that_of_another_triton_is_not_taken(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (made,) = folder.iterdir()
    shutil.copy(made, tmp_path / made.name.replace(made.name[11:27], "0" * 16))
    monkeypatch.setattr(launcher, "PLACE", tmp_path)
    assert launcher.precompiled() is None


def without_compiler(
    program: str, folder: Path, tmp_path: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    (tmp_path / "bin").mkdir()
    told = {name: value for name, value in os.environ.items() if name != "CC"}
    told |= {"PATH": str(tmp_path / "bin"), "TRITON_CACHE_DIR": str(tmp_path / "cache"), **environment}
    command = [sys.executable, "-c", program, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=told, cwd=ROOT, timeout=100)


@pytest.fixture
def stand_in(folder: Path, tmp_path: Path) -> Path:
    """A folder with a driver that does nothing, for machines that have none."""
    import triton

    backend = Path(triton.__file__).parent / "backends" / "nvidia"
    where = tmp_path / "driver"
    where.mkdir()

    include = (f"-I{backend / 'include'}", f"-I{sysconfig.get_paths()['include']}")
    command = [sys.executable, "-c", STAND_IN, str(where), *include, str(backend / "driver.c")]
    subprocess.run(command, check=True, cwd=ROOT, timeout=60)
    return where


@pytest.mark.parametrize("is_there", [True, False])
def test_triton_loads_it(folder: Path, stand_in: Path, tmp_path: Path, is_there: bool) -> None:
    driver = {"TRITON_LIBCUDA_PATH": str(stand_in), "LD_LIBRARY_PATH": str(stand_in)}
    done = without_compiler(LOAD, folder if is_there else tmp_path, tmp_path, **driver)
    if is_there:
        assert done.stdout == "launch\n", done.stderr[-2000:]
    else:
        assert "Failed to find C compiler" in done.stderr


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda patch: patch.setattr(launcher, "_backend", lambda: None), "there is no triton"),
        (lambda patch: patch.setattr(launcher, "compiler", lambda: None), "no C compiler"),
        (lambda patch: patch.setattr(launcher, "compiler", lambda: "/bin/false"), "/bin/false"),
    ],
)
def test_what_is_missing_is_a_sentence(
    break_it: Callable[[pytest.MonkeyPatch], None],
    says: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_it(monkeypatch)
    assert launcher.main([str(tmp_path / "out")]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prompts_are_computed_without_a_compiler(folder: Path, tmp_path: Path) -> None:
    done = without_compiler(RUN, folder, tmp_path)
    assert done.stdout == "as torch\n", done.stderr[-2000:]
