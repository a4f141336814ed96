"""Which files of a folder are the checkpoint's weights, and what the folder is when it is something else."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_api.checkpoint.errors import CheckpointError
from gptq_api.on_disk import FolderError, cannot_be_read, is_there, model_folder, unreadable, without_mark

_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})$")
_PICKLES = (".pt", ".pth", ".bin")
_MAX_JSON_BYTES = 64 * 2**20
_MAX_DEPTH = 32


@dataclass(frozen=True)
class WeightFiles:
    """One set of weights: one file, or the shards of an index."""

    folder: Path
    files: tuple[Path, ...]
    layout: str
    """for people: "one safetensors file", "3 shards with an index" ..."""

    @property
    def name(self) -> str:
        """Of the files, without endings and numbers of shards."""
        shard = _SHARD.match(self.files[0].stem)
        return shard["stem"] if shard else self.files[0].stem


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint folder. CheckpointError where it cannot be read or is something else."""
    refuse_unreadable(path)
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_JSON_BYTES >> 20} MiB; it is not a configuration file")
        value = json.loads(without_mark(path.read_bytes()).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(cannot_be_read(path, error)) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__} where an object is expected")
    if _is_deep(value):
        raise CheckpointError(f"{path} is nested {_MAX_DEPTH} deep; it is not a configuration file")
    return value


def _is_deep(value: Any) -> bool:
    """A value as deep as the interpreter's stack can be parsed, and not be shown in an error."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def checkpoint_folder(path: Path) -> Path:
    """The folder a model path means: itself, or the folder of the weights file it names."""
    try:
        return model_folder(path)
    except FolderError as error:
        raise CheckpointError(str(error)) from None


def refuse_unreadable(path: Path) -> None:
    """CheckpointError where the content of a file cannot be had, whatever it would be."""
    sentence = unreadable(path)
    if sentence is not None:
        raise CheckpointError(sentence)


def candidates(path: Path, ckpt: Path | None = None) -> list[WeightFiles]:
    """Every set of weights the folder holds, the likeliest first; exactly one where the user named it.

    CheckpointError where there is none, a shard is missing, or only formats of other programs are there.
    """
    folder = checkpoint_folder(path)
    if ckpt is None and not path.is_dir():
        ckpt = path
    if ckpt is not None:
        return [_named(folder, ckpt)]
    indexes = sorted(folder.glob("*.safetensors.index.json")) + sorted(folder.glob("*.bin.index.json"))
    found = [_from_index(folder, index) for index in indexes]
    claimed = {file for weights in found for file in weights.files}
    for suffix in (".safetensors", *_PICKLES):
        # A link into nothing is a file that is missing, not one that never was.
        files = [f for f in sorted(folder.glob(f"*{suffix}")) if not f.is_dir() and f not in claimed]
        found.extend(_group_shards(folder, files))
    if not found:
        raise CheckpointError(_nothing_found(folder))
    # A folder with the same model as .safetensors and as a pickle: the one that cannot hold code comes first.
    return sorted(found, key=lambda weights: weights.files[0].suffix != ".safetensors")


def _named(folder: Path, ckpt: Path) -> WeightFiles:
    file = ckpt if os.path.isfile(ckpt) else folder / ckpt
    if not is_there(file):
        raise CheckpointError(f"--gptq-ckpt {ckpt}: no such file, neither as given nor in {folder}")
    if file.name.endswith(".index.json"):
        return _from_index(folder, file)
    _refuse_suffix(file)
    shard = _SHARD.match(file.stem)
    if shard:
        siblings = sorted(file.parent.glob(f"{shard['stem']}-*-of-{shard['total']}{file.suffix}"))
        return _group_shards(folder, siblings)[0]
    return WeightFiles(folder, (file,), _one_file(file))


def _refuse_suffix(file: Path) -> None:
    if file.suffix == ".gguf":
        raise CheckpointError(f"{file} is a GGUF file (llama.cpp); use a GPTQ checkpoint of the model")
    if file.suffix not in (".safetensors", *_PICKLES):
        raise CheckpointError(f"{file} is no weights file: .safetensors, .pt, .pth or .bin is expected")


def _one_file(file: Path) -> str:
    return "one safetensors file" if file.suffix == ".safetensors" else f"one {file.suffix} file (pickled tensors)"


def _from_index(folder: Path, index: Path) -> WeightFiles:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    names = sorted({str(name) for name in weight_map.values()})
    files = []
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} points outside its folder ({name!r}); download it again")
        if not is_there(folder / name):
            raise CheckpointError(f"{folder} lacks the shard {name} that {index.name} names; download it")
        files.append(folder / name)
    return WeightFiles(folder, tuple(files), f"{len(files)} shards with an index")


def _group_shards(folder: Path, files: list[Path]) -> list[WeightFiles]:
    groups: dict[tuple[str, int], list[Path]] = {}
    found = []
    for file in files:
        shard = _SHARD.match(file.stem)
        if shard:
            groups.setdefault((shard["stem"], int(shard["total"])), []).append(file)
        else:
            found.append(WeightFiles(folder, (file,), _one_file(file)))
    for (stem, total), shards in groups.items():
        if len(shards) != total:
            raise CheckpointError(f"{folder} holds {len(shards)} of the {total} shards of {stem}; download the others")
        found.append(WeightFiles(folder, tuple(shards), f"{total} shards without an index"))
    return found


def _nothing_found(folder: Path) -> str:
    if any(folder.glob("*.gguf")):
        return f"{folder} holds GGUF files (llama.cpp); use a GPTQ checkpoint of the model"
    if any(folder.glob("*.npz")):
        return f"{folder} holds MLX or NumPy weights (.npz); use a GPTQ checkpoint of the model"
    return f"{folder} holds no weights (.safetensors, .pt, .pth, .bin); is it the checkpoint folder?"
