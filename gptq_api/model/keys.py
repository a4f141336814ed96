"""Bounds-checked access to one JSON object of a checkpoint."""

from __future__ import annotations

from typing import Any

from gptq_api.checkpoint.errors import CheckpointError


class Keys:
    """Values of `raw`; CheckpointError names the file (`source`), the key and the value."""

    def __init__(self, raw: dict[str, Any], source: str) -> None:
        self._raw = raw
        self._source = source

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self._raw.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise CheckpointError(f"{self._source} lacks {key}; copy config.json from the original model")
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise CheckpointError(f"{self._source}: {key} is {value!r}, not an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float) -> float:
        value = self._raw.get(key)
        if value is None:
            return default
        # A NaN fails both comparisons, so it is refused here too.
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise CheckpointError(f"{self._source}: {key} is {value!r}, not a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.optional_flag(key)
        return default if value is None else value

    def optional_flag(self, key: str) -> bool | None:
        value = self._raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{self._source}: {key} is {value!r} where true or false is expected")
        return value
