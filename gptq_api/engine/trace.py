"""A file of steps: what the engine launched, what came back and when, one line of JSON each. tools/replay.py runs it
again.

The first line is a `TraceHead`, every other one a `TracedStep`. The file holds the token ids of prompts and answers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from gptq_api.errors import ConfigError
from gptq_api.step import Sampled, Step

_log = logging.getLogger(__name__)


class TraceHead(msgspec.Struct, frozen=True):
    """What the steps were computed with."""

    model_path: str
    device: str
    dtype: str
    block_size: int
    num_blocks: int
    max_num_seqs: int


class TracedStep(msgspec.Struct, frozen=True):
    at_s: float
    """seconds since the trace began, when the step was launched"""
    launch_ms: float
    """until `launch` returned"""
    total_ms: float
    """until its result was there"""
    step: Step
    sampled: Sampled


class Trace:
    """Writes. A file that cannot be written any more ends the trace and nothing else."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where the file cannot be written. What is in it stays until `begin`."""
        self._path = path
        with self._writing():
            self._file = path.open("ab")

    def begin(self, head: TraceHead) -> None:
        """Raises ConfigError. Before any `write`."""
        self._began = time.perf_counter()
        with self._writing():
            if self._path.is_file():  # and not a pipe
                self._file.truncate(0)
            self._line(head)
        self._open = True

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"--trace {self._path} cannot be written: {error.strerror}") from None

    def write(self, began: float, launched: float, collected: float, step: Step, sampled: Sampled) -> None:
        """`began`, `launched`: time.perf_counter() before and after the launch; `collected`: when the result was
        there."""
        if not self._open:
            return
        launch_ms, total_ms = (launched - began) * 1e3, (collected - began) * 1e3
        at_s = began - self._began
        try:
            self._line(TracedStep(round(at_s, 6), round(launch_ms, 4), round(total_ms, 4), step, sampled))
        except OSError as error:
            self._open = False
            _log.warning("the trace ends here: %s", error.strerror)

    def _line(self, value: msgspec.Struct) -> None:
        self._file.write(msgspec.json.encode(value) + b"\n")
        self._file.flush()


def read_trace(path: Path) -> tuple[TraceHead, Iterator[TracedStep]]:
    """(its head, its steps, read one by one). msgspec.MsgspecError for what is no trace, OSError."""
    lines = path.open("rb")
    head = msgspec.json.decode(next(lines, b""), type=TraceHead)
    decoder = msgspec.json.Decoder(TracedStep)
    return head, (decoder.decode(line) for line in lines)
