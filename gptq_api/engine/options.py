"""What an engine process is told at its start, in the first frame of its socket: plain values, so that it need not
import how settings are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from gptq_api.engine.kv_events import KvEventsAt
from gptq_api.runner.options import LoadOptions

if TYPE_CHECKING:
    from gptq_api.config import EngineSettings


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The settings of the same names (config.py)."""

    load: LoadOptions
    enable_prefix_caching: bool
    speculate: Literal["off", "auto", "ngram"]
    trace: Path | None
    kv_events: KvEventsAt | None = None

    @classmethod
    def of(cls, settings: EngineSettings) -> EngineOptions:
        from gptq_api.config import Settings  # only here, in the API process

        events = None
        if isinstance(settings, Settings) and settings.kv_events is not None:
            events = KvEventsAt(settings.kv_events, settings.kv_events_replay, settings.kv_events_topic)
        return cls(
            load=LoadOptions.of(settings),
            enable_prefix_caching=settings.enable_prefix_caching,
            speculate=settings.speculate,
            trace=settings.trace,
            kv_events=events,
        )

    def encoded(self) -> bytes:
        return msgspec.json.encode(self, enc_hook=str)  # paths

    @classmethod
    def decoded(cls, data: bytes) -> EngineOptions:
        """msgspec.ValidationError for what `encoded` did not make."""
        return msgspec.json.decode(data, type=cls, dec_hook=lambda kind, value: kind(value))
