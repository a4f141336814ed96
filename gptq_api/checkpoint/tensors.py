"""Names, shapes and data of the tensors in one set of weights, whatever the container. Nothing is read before it is
asked for; pickles are opened with weights_only, so no code in them can run."""

from __future__ import annotations

import copy
import math
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_api.checkpoint.device_reader import DeviceReader, Fetch
from gptq_api.checkpoint.errors import CheckpointError
from gptq_api.checkpoint.files import WeightFiles, refuse_unreadable
from gptq_api.checkpoint.large_pages import weight_memory
from gptq_api.checkpoint.parts import TensorPart
from gptq_api.checkpoint.pickles import CodeError, NoTensorError, check_pickle
from gptq_api.checkpoint.safetensors_file import SafetensorsFile, first_line, system_error
from gptq_api.on_disk import cannot_be_read

_PREFIX = re.compile(r"^(?:(?:base_model\.model|_orig_mod|module)\.)+")
_CODE = re.compile(r"(?i:unsupported (?:global: global|global|class))\s+([\w.<>]+)")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""what can be computed with; the 8-bit types of other quantizations cannot"""


class TensorStore:
    """The tensors of a set of weights by canonical name (prefixes such as `base_model.model.` and `module.`
    removed)."""

    def __init__(self, weights: WeightFiles) -> None:
        self.weights = weights
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, tuple[SafetensorsFile, str]] = {}
        """canonical name -> where, and as what"""
        self._tensors: dict[str, tuple[Tensor, Path]] = {}
        self._reader: DeviceReader | None = None
        self._fetches: dict[str, Fetch] = {}
        """what is on its way to the device"""
        for file in weights.files:
            if file.suffix == ".safetensors":
                self._open_safetensors(file)
            else:
                self._open_pickle(file)
        if not self._entries and not self._tensors:
            raise CheckpointError(f"{weights.files[0]} holds no tensors; download it again")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._entries) | frozenset(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self._tensors

    def file(self, name: str) -> Path:
        return self._entries[name][0].path if name in self._entries else self._tensors[name][1]

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header alone."""
        if name in self._entries:
            file, key = self._entries[name]
            return file.entries[key].shape
        return tuple(self._tensors[name][0].shape)

    def numel(self, name: str) -> int:
        return math.prod(self.shape(name))

    def dtype(self, name: str) -> torch.dtype | None:
        """From the header alone; None for a type torch does not know or we never use."""
        if name in self._entries:
            file, key = self._entries[name]
            return file.entries[key].dtype
        return self._tensors[name][0].dtype

    def is_float(self, name: str) -> bool:
        return self.dtype(name) in _FLOATS

    def dtype_name(self, name: str) -> str:
        """For people: the type as the container calls it, those that torch does not know included."""
        if name in self._entries:
            file, key = self._entries[name]
            dtype = file.entries[key].dtype
            return file.entries[key].raw_dtype if dtype is None else str(dtype).removeprefix("torch.")
        return str(self._tensors[name][0].dtype).removeprefix("torch.")

    def own(self, name: str, part: TensorPart | None = None) -> Tensor:
        """As `read`, in memory for weights."""
        if self._reader is not None:
            return self.read(name, part)
        if name in self._entries:
            file, key = self._entries[name]
            return file.read(key, weight_memory, part)
        tensor = self._mapped(name, part)
        return weight_memory(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def read(self, name: str, part: TensorPart | None = None) -> Tensor:
        """The tensor or a part of it on the CPU, contiguous. That of a pickle shares memory with the mapped file:
        `own` is for what is kept. After `on`, in memory of its own on the reader's device.

        KeyError for an unknown name (callers check); CheckpointError where the data cannot be read.
        """
        if self._reader is None:
            return self.on_cpu(name, part)
        if name in self._fetches and self._fetches[name].part != part:
            self._fetches.pop(name).wait()  # something else of it is wanted than was foreseen
        self.prefetch([name], {} if part is None else {name: part})
        if name in self._fetches:
            return self._fetches.pop(name).wait()
        return self.on_cpu(name, part).to(self._reader.device)

    def on_cpu(self, name: str, part: TensorPart | None = None) -> Tensor:
        if name in self._entries:
            file, key = self._entries[name]
            return file.read(key, part=part)
        return self._mapped(name, part).contiguous()

    def _mapped(self, name: str, part: TensorPart | None) -> Tensor:
        tensor = self._tensors[name][0]
        return tensor if part is None else part.of(tensor)

    @property
    def device(self) -> torch.device:
        """Where `read` gives tensors."""
        return torch.device("cpu") if self._reader is None else self._reader.device

    def on(self, reader: DeviceReader) -> TensorStore:
        """The same tensors, read to the reader's device."""
        store = copy.copy(self)
        store._reader, store._fetches = reader, {}
        return store

    def prefetch(self, names: Iterable[str], parts: Mapping[str, TensorPart]) -> None:
        """Begin to read what will be asked for next, of some tensors a part. Nothing happens where nothing runs beside
        the caller: on the CPU, and for pickles."""
        for name in names:
            if self._reader is None or name in self._fetches or name not in self._entries:
                continue
            file, key = self._entries[name]
            entry = file.entries[key]
            if entry.dtype is not None:
                self._fetches[name] = self._reader.fetch(file.path, key, entry, parts.get(name))

    def _open_safetensors(self, path: Path) -> None:
        file = SafetensorsFile(path)
        self.metadata.update(file.metadata)
        for key in file.entries:
            name = _PREFIX.sub("", key)
            self._claim(name, path)
            self._entries[name] = (file, key)

    def _open_pickle(self, file: Path) -> None:
        refuse_unreadable(file)
        try:
            state = _load_pickle(file)
        except Exception as error:
            # torch.load raises whatever its parsers stumble on (UnpicklingError, EOFError, KeyError, struct.error ...).
            raise CheckpointError(_refusal(file, error)) from None
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict):
            raise CheckpointError(f"{file} holds a {type(state).__name__}, not a state_dict; save model.state_dict()")
        for key, value in state.items():
            if isinstance(key, str) and isinstance(value, Tensor):
                name = _PREFIX.sub("", key)
                self._claim(name, file)
                self._tensors[name] = (_plain(value, name, file), file)

    def _claim(self, name: str, file: Path) -> None:
        if name in self:
            raise CheckpointError(
                f"tensor {name} is in both {self.file(name)} and {file}; remove the file that is stale"
            )


def _load_pickle(file: Path) -> Any:
    check_pickle(file)
    # Only the zip container can be mapped; the older stream format has to be read.
    with warnings.catch_warnings(action="ignore"):  # about the pickle's protocol
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _refusal(file: Path, error: Exception) -> str:
    """Why torch could not read a pickle, without its advice to turn the protection off."""
    refused = system_error(error)
    if refused is not None:
        return cannot_be_read(file, refused)
    code = _CODE.search(str(error))
    if isinstance(error, CodeError) or code is not None:
        name = str(error) if code is None else code[1]
        what = f"pickled code ({name[:100]}), which is never run"
        return f"{file} holds {what}; use a .safetensors file or its state_dict"
    if isinstance(error, NoTensorError):
        return f"{file} holds what is no plain tensor ({error}); use a .safetensors file"
    why = "its pickle is damaged, or not torch.save's" if "weights_only" in str(error) else first_line(error)
    return f"{file} is not a readable torch file ({why}); download it again"


def _plain(value: Tensor, name: str, file: Path) -> Tensor:
    """A tensor that is what it says: a few numbers in the file can pretend to be a tensor of any size."""
    tensor = value.detach()
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(f"{file}: tensor {name} is no plain tensor; use a .safetensors file")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{file}: tensor {name} is larger than its stored data; download the file again")
    return tensor
