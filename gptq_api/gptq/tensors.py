"""Names, shapes and data of the tensors in one set of weights, whatever the container. Nothing is read before it is
asked for; pickles are opened with weights_only, so no code in them can run."""

from __future__ import annotations

import math
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptq_api.gptq.errors import CheckpointError
from gptq_api.gptq.files import WeightFiles

_PREFIX = re.compile(r"^(?:(?:base_model\.model|_orig_mod|module)\.)+")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""what can be computed with; the 8-bit types of other quantisations cannot"""


class TensorStore:
    """The tensors of a set of weights by canonical name (prefixes such as `base_model.model.` and `module.`
    removed)."""

    def __init__(self, weights: WeightFiles) -> None:
        self.weights = weights
        self.metadata: dict[str, str] = {}
        self._slices: dict[str, tuple[Any, str, Path]] = {}
        self._tensors: dict[str, tuple[Tensor, Path]] = {}
        for file in weights.files:
            if file.suffix == ".safetensors":
                self._open_safetensors(file)
            else:
                self._open_pickle(file)
        if not self._slices and not self._tensors:
            raise CheckpointError(f"{weights.files[0]} holds no tensors; download it again")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._slices) | frozenset(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._slices or name in self._tensors

    def file(self, name: str) -> Path:
        return self._slices[name][2] if name in self._slices else self._tensors[name][1]

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header alone."""
        if name in self._slices:
            reader, key, _ = self._slices[name]
            return tuple(reader.get_slice(key).get_shape())
        return tuple(self._tensors[name][0].shape)

    def numel(self, name: str) -> int:
        return math.prod(self.shape(name))

    def dtype(self, name: str) -> torch.dtype | None:
        """From the header alone; None for a type torch does not know or we never use."""
        if name in self._slices:
            reader, key, _ = self._slices[name]
            return _DTYPES.get(reader.get_slice(key).get_dtype())
        return self._tensors[name][0].dtype

    def is_float(self, name: str) -> bool:
        return self.dtype(name) in _FLOATS

    def dtype_name(self, name: str) -> str:
        """For people: the type as the container calls it, those that torch does not know included."""
        if name in self._slices:
            reader, key, _ = self._slices[name]
            raw = str(reader.get_slice(key).get_dtype())
            return str(_DTYPES[raw]).removeprefix("torch.") if raw in _DTYPES else raw
        return str(self._tensors[name][0].dtype).removeprefix("torch.")

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, contiguous. It may share memory with the mapped file: clone what is kept.

        KeyError for an unknown name (callers check); CheckpointError where the data cannot be read.
        """
        if name in self._slices:
            reader, key, file = self._slices[name]
            try:
                tensor: Tensor = reader.get_tensor(key)
            except (SafetensorError, RuntimeError, OSError, ValueError, TypeError) as error:
                raise CheckpointError(
                    f"{file}: tensor {key} cannot be read ({error}); download the file again"
                ) from None
            return tensor
        return self._tensors[name][0].contiguous()

    def _open_safetensors(self, file: Path) -> None:
        try:
            reader = safe_open(str(file), framework="pt")
            keys: list[str] = list(reader.keys())  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} is not a complete safetensors file ({_first_line(error)}); download it again"
            ) from None
        self.metadata.update(reader.metadata() or {})  # type: ignore[no-untyped-call]
        for key in keys:
            self._claim(_PREFIX.sub("", key), file)
            self._slices[_PREFIX.sub("", key)] = (reader, key, file)

    def _open_pickle(self, file: Path) -> None:
        try:
            state = _load_pickle(file)
        except Exception as error:
            # torch.load raises whatever its parsers stumble on (UnpicklingError, EOFError, KeyError, struct.error ...).
            if any(f"Unsupported {what}" in str(error) for what in ("global", "class", "operand")):
                raise CheckpointError(
                    f"{file} holds pickled code, which is never run; use a .safetensors file or its state_dict"
                ) from None
            raise CheckpointError(
                f"{file} is not a readable torch file ({_first_line(error)}); download it again"
            ) from None
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
    # Only the zip container can be mapped; the older stream format has to be read.
    mapped = zipfile.is_zipfile(file)
    if mapped:
        with zipfile.ZipFile(file) as container:
            # torch never compresses: a compressed entry could be a thousand times its size in memory.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in container.infolist()):
                raise ValueError("a compressed zip file")
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def _plain(value: Tensor, name: str, file: Path) -> Tensor:
    """A tensor that is what it says: a few numbers in the file can pretend to be a tensor of any size."""
    tensor = value.detach()
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(f"{file}: tensor {name} is no plain tensor; use a .safetensors file")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{file}: tensor {name} is larger than its stored data; download the file again")
    return tensor


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
