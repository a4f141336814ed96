"""What commands say of an error for people, and what they leave alone."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from gptq_api.cli import bench, inspect, quantize
from gptq_api.config import BenchSettings, InspectSettings, QuantizeSettings
from gptq_api.errors import UserError, writing
from tests.support.commands import Commands
from tests.support.float_models import random_folder

TEXT = Path(__file__).parents[1] / "README.md"


def test_every_error_for_people_is_of_the_one_family() -> None:
    root = Path(importlib.import_module("gptq_api").__file__ or "").parent
    names = [line for path in root.rglob("*.py") for line in path.read_text().splitlines() if line.startswith("class ")]
    assert not [name for name in names if "Error(ValueError)" in name], "a ValueError is a bug of ours"
    assert sum("Error(UserError)" in name for name in names) >= 10


@pytest.mark.parametrize(
    ("module", "work", "settings"),
    [
        (inspect, "inspect", InspectSettings()),
        (quantize, "_run", QuantizeSettings(model_path="x", out=Path("y"))),
        (bench, "_check_outputs", BenchSettings()),
    ],
    ids=["inspect", "quantize", "bench"],
)
def test_a_bug_of_ours_is_no_users_mistake(
    module: object, work: str, settings: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def buggy(*_: object) -> None:
        list(zip([1], [1, 2], strict=True))

    monkeypatch.setattr(module, work, buggy)
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):
        module.run(settings)  # type: ignore[attr-defined]

    def refused(*_: object) -> None:
        raise UserError("the value, and the remedy")

    monkeypatch.setattr(module, work, refused)
    assert module.run(settings) == 1  # type: ignore[attr-defined]
    assert capsys.readouterr().err.endswith(": the value, and the remedy\n")


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "nothing" / "here"
    told = pytest.raises(UserError, match=r"nothing/here cannot be written: No such file or directory")
    with told, writing(file):
        file.write_text("")
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError("a bug")


@pytest.mark.parametrize("limit", [2_000, 60_000])
def test_a_disk_that_is_full_is_a_sentence_and_the_run_goes_on_later(
    limit: int, torch_commands: Commands, tmp_path: Path
) -> None:
    """A limit on the size of files is refused by the kernel as a full disk is: in a layer, or in the checkpoint."""
    model, out = random_folder(tmp_path / "model"), tmp_path / "out"
    flags = "--group-size 32 --num-samples 4 --num-eval-samples 2 --sample-length 64 --num-threads 1 --device cpu"
    command = ("quantize", str(model), str(out), "--calibration", str(TEXT), *flags.split())
    done = torch_commands.run(*command, max_file_bytes=limit)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith("gptq-api quantize: ") and "cannot be written: File too large" in last
    assert "MiB, and ulimit -f is lower; the same command goes on with what is left" in last
    assert not out.exists()
    assert torch_commands.run(*command).returncode == 0 and out.is_dir()
