"""tools/install.py: which environment will do, which torch is taken, and that nothing is done in silence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tools import install

SCRIPT = Path(install.__file__)
HERE = "{}.{}".format(*sys.version_info[:2])


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    return folder


def test_an_environment_that_is_there_is_left_alone(environment: Path) -> None:
    assert install.why_stale(environment, must_be_mine=True) == ""
    (environment / ".installed").touch()
    done = subprocess.run(
        [sys.executable, SCRIPT, "--venv", environment], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout + done.stderr == ""


def test_an_environment_of_another_python_is_told(environment: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(environment, tmp_path / "venv", symlinks=True)
    config = (copy / "pyvenv.cfg").read_text()
    (copy / "pyvenv.cfg").write_text(config.replace(f"version = {HERE}", "version = 3.9"))
    assert install.why_stale(copy, must_be_mine=False) == f"was made by Python 3.9, which is {HERE} now"
    (copy / "bin" / "python").unlink()
    (copy / "bin" / "python").symlink_to("/no/such/python")
    assert "does not run" in install.why_stale(copy, must_be_mine=False)
    install.remake(copy, "is stale", install.Talker(copy))
    assert not copy.exists()


def test_a_folder_that_is_no_environment_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years")
    done = subprocess.run([sys.executable, SCRIPT, "--venv", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "is no virtual environment; move it away" in done.stderr
    assert (tmp_path / "thesis.txt").exists()


def test_an_old_python_is_one_sentence(tmp_path: Path) -> None:
    """With a Python that is old, where there is one; the sentence comes before anything is made."""
    found = [Path(path) for minor in (10, 9, 8, 7) if (path := shutil.which(f"python3.{minor}"))]
    old = [path for path in found if install.version_of(path)]
    if not old:
        pytest.skip("no Python before 3.11 is here")
    done = subprocess.run([old[0], SCRIPT, "--venv", tmp_path / "v"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "gptq-api needs Python 3.11 or newer" in done.stderr and not (tmp_path / "v").exists()


def torch_wheel(folder: Path, wants: str) -> Path:
    version = next(
        line.split("==")[1] for line in (install.ROOT / "constraints.txt").read_text().split() if line[:7] == "torch=="
    )
    path = folder / f"torch-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        told = f"torch-{version}.dist-info"
        archive.writestr(f"{told}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n{wants}")
        archive.writestr(f"{told}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{told}/RECORD", "")
    return path


@pytest.mark.parametrize(("wants", "cuda"), [("Requires-Dist: nvidia-cudnn-cu13==9.2\n", True), ("", False)])
def test_pip_is_asked_which_torch_it_would_take(
    wants: str, cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_wheel(tmp_path, wants)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert install.pip_takes_cuda(Path(sys.executable)) is cuda


def test_an_image_for_a_gpu_gets_no_torch_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_wheel(tmp_path, "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    told = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "TORCH": "cuda"}
    (tmp_path / "requirements.txt").touch()
    where = ["--requirements", str(tmp_path / "requirements.txt"), "--venv", str(tmp_path / "venv")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *where], capture_output=True, text=True, env={**os.environ, **told}, check=False
    )
    assert done.returncode == 1 and "would take a build without CUDA here" in done.stderr


def test_what_says_nothing_is_talked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "SILENCE_S", 0.1)
    (tmp_path / "lib").mkdir()
    quiet = "import os, time; open(os.environ['TMPDIR'] + '/f', 'w').write('x' * 2_000_000); time.sleep(1)"
    install.Talker(tmp_path).run("a long build", [sys.executable, "-c", quiet])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("a long build") and len(lines) > 3
    assert any("... a long build; 2 MB fetched or built" in line for line in lines)
    with pytest.raises(install.InstallError, match=r"(?s)a wrong one failed.*no such thing"):
        install.Talker(tmp_path).run("a wrong one", [sys.executable, "-c", "import sys; sys.exit('no such thing')"])


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("  Downloading numpy-2.4.6-cp311.whl (16.9 MB)", "Downloading numpy-2.4.6-cp311.whl (16.9 MB)"),
        ("  Building editable for gptq-api (pyproject.toml): started", "compiling the kernels"),
        ("Installing collected packages: a, b, c", "installing collected packages: 3 of them"),
        ("Requirement already satisfied: a in b", None),
    ],
)
def test_of_pip_s_lines_those_are_shown_that_say_what_it_is_at(line: str, shown: str | None) -> None:
    assert (install.TOLD.match(line) is not None) == (shown is not None)
    assert shown is None or install.shortened(line).startswith(shown)


def test_what_pyproject_asks_for_is_listed() -> None:
    command = [sys.executable, str(SCRIPT), "--list-dependencies"]
    done = subprocess.run([*command, "events"], capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert any(line.startswith("torch>=") for line in lines) and any(line.startswith("pyzmq>=") for line in lines)
    none = subprocess.run([*command, ""], capture_output=True, text=True, timeout=60, check=True)
    assert none.stdout.splitlines() == [line for line in lines if not line.startswith("pyzmq")]
    wrong = subprocess.run([*command, "evens"], capture_output=True, text=True, timeout=60, check=False)
    assert wrong.returncode == 1 and wrong.stderr.startswith("install: 'evens' is no extra of gptq-api; there are ")
