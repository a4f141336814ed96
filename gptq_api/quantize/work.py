"""The folder of a run in progress, OUT.partial: a file per finished layer, so that a run that was stopped goes on."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptq_api.errors import UserError, writing

GOES_ON = "the same command goes on with what is left"
_RUN = "run.json"


class WorkError(UserError):
    """OUT or OUT.partial cannot be used: one sentence with the remedy."""


@dataclass(frozen=True)
class ModuleReport:
    """What quantizing one module cost."""

    module: str
    """its name in the model"""
    error: float | None
    """|X (W - W')^T|^2 / |X W^T|^2 over the calibration inputs X; None where there were none"""
    damp_percent: float
    """what the factorisation took"""
    num_low_zeros: int
    """zero points of 0"""


class WorkFolder:
    """Held by one process at a time; close it, or leave its `with`, to let go of it."""

    def __init__(self, out: Path, fingerprint: dict[str, Any]) -> None:
        """`fingerprint`: JSON values that say what the run computes. WorkError where OUT exists, or where the work in
        OUT.partial is that of a run with another fingerprint or of one that is still going on."""
        if out.exists() or out.is_symlink():
            raise WorkError(f"{out} exists; name a folder that does not")
        if not out.parent.is_dir():
            raise WorkError(f"{out.parent} is no folder; make it first")
        self._out = out
        self.path = out.with_name(f"{out.name}.partial")
        try:
            self.path.mkdir(exist_ok=True)
            self._lock = open(self.path / "lock", "w")  # noqa: SIM115  (open as long as the folder is ours)
        except OSError as error:
            raise WorkError(f"{self.path} cannot be made: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise WorkError(f"{self.path} is in use: another run is writing {out.name}") from None
        try:
            self._check(fingerprint)
        except WorkError:
            self.close()
            raise

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._lock.close()

    def _check(self, fingerprint: dict[str, Any]) -> None:
        file = self.path / _RUN
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            _write_whole(file, json.dumps(fingerprint, indent=2) + "\n")
            return
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise WorkError(f"{file} is damaged; delete {self.path}, or name another folder")
        wanted = json.loads(json.dumps(fingerprint))
        changed = [key for key in wanted | found if wanted.get(key) != found.get(key)]
        if changed:
            key = changed[0]
            raise WorkError(
                f"{self.path} holds the work of a run with another {key.replace('_', ' ')} "
                f"({found.get(key)}, not {wanted.get(key)}); delete it, or name another folder"
            )

    def layer_file(self, index: int) -> Path:
        return self.path / f"layer-{index:05d}.safetensors"

    def read(self, index: int) -> tuple[dict[str, Tensor], list[ModuleReport]] | None:
        """The tensors of a finished layer by name, and its reports; None where it is to be done."""
        file = self.layer_file(index)
        if not file.exists():
            return None
        try:
            with safe_open(str(file), framework="pt") as reader:
                tensors: dict[str, Tensor] = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
                reports = [ModuleReport(**report) for report in json.loads(reader.metadata()["reports"])]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise WorkError(f"{file} is damaged ({error}); delete it, and the layer is done again") from None
        return tensors, reports

    def write(self, index: int, tensors: dict[str, Tensor], reports: list[ModuleReport]) -> None:
        """All of a layer or nothing: what a killed run leaves is a file with another name."""
        file = self.layer_file(index)
        unfinished = file.with_suffix(".unfinished")
        with writing(file, sum(tensor.nbytes for tensor in tensors.values()), GOES_ON):
            try:
                save_tensors(tensors, unfinished, {"reports": json.dumps([asdict(report) for report in reports])})
            except OSError:
                unfinished.unlink(missing_ok=True)
                raise
            os.replace(unfinished, file)

    @property
    def num_bytes(self) -> int:
        """Of the layers that are finished."""
        return sum(file.stat().st_size for file in self.path.glob("layer-*.safetensors"))

    def finish(self, checkpoint: Path) -> None:
        """`checkpoint`, a folder in this one, becomes OUT; the rest is deleted."""
        try:
            os.rename(checkpoint, self._out)
        except OSError as error:
            raise WorkError(
                f"{self._out} cannot be written: {error.strerror}; the checkpoint is {checkpoint}"
            ) from None
        self.close()
        shutil.rmtree(self.path)


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Raises OSError where the library says with an error of its own that the file system refused."""
    try:
        save_file(tensors, file, metadata=metadata)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from None


def _write_whole(file: Path, text: str) -> None:
    unfinished = file.with_suffix(".unfinished")
    with writing(file):
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, file)
