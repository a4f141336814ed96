"""Log lines on stderr: readable ones, or one JSON object each. Logging never waits and never fails.

`log`, logging, warnings, uncaught exceptions ─> a bounded queue ─> one thread ─> write(2)

Each of a server's three processes imports this module first, so it is made of the standard library alone.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import queue
import select
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from gptq_api.errors import printable

MAX_QUEUED_BYTES = 128 * 1024
"""What waits for a slow reader: a thousand lines, more than one for each request that is admitted at a time. In bytes,
because a line may be a traceback, and what is bounded here is memory."""
ATOMIC_BYTES = select.PIPE_BUF
"""So much goes into a pipe in one piece, whoever else writes into it: the engine process has the same stderr."""
FLUSH_S = 1.0
"""How long the end of the process waits for lines to be written"""


class Writer:
    """Writes lines to a file descriptor in a thread of its own, in their order.

    A line that finds the queue full is dropped, and so is one that cannot be written (disk full, reader gone).
    """

    def __init__(self, fd: int) -> None:
        self.num_dropped = 0
        self._fd = fd
        self._num_queued_bytes = 0  # until they are written
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # the collector may run a destructor that logs while this thread holds it
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def msg(self, line: str) -> None:
        """Queue one line. The lock is never held over a write."""
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        size = len(data)
        with self._lock:
            if self._num_queued_bytes + size > MAX_QUEUED_BYTES:
                self.num_dropped += 1
            else:
                self._num_queued_bytes += size
                self._queue.put(data)

    def close(self) -> None:
        """Wait FLUSH_S at most until all is written. A thread that is stuck in its write is left behind: it holds no
        lock of the interpreter's, and ends with the process."""
        self._queue.put(None)
        self._thread.join(FLUSH_S)

    def _run(self) -> None:
        at_end = False
        while not at_end:
            lines = [self._queue.get()]
            while not self._queue.empty():  # nobody else takes
                lines.append(self._queue.get())
            at_end = None in lines
            for batch in _batches([line for line in lines if line is not None]):
                self._write(batch)

    def _write(self, batch: list[bytes]) -> None:
        data = b"".join(batch)
        size, written = len(data), False
        with contextlib.suppress(OSError):
            while data:
                try:
                    data = data[os.write(self._fd, data) :]
                except BlockingIOError:  # somebody at the other end made it non-blocking
                    select.select([], [self._fd], [])
            written = True
        with self._lock:
            self._num_queued_bytes -= size
            if not written:
                self.num_dropped += len(batch)


def _batches(lines: list[bytes]) -> Iterator[list[bytes]]:
    """Lines for one write each: as many as are not torn. After every write the thread waits for the interpreter, up to
    5 ms where the event loop is busy: of writes that take 0.1 ms it made 480 a second."""
    batch: list[bytes] = []
    size = 0
    for line in lines:
        if batch and size + len(line) > ATOMIC_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += len(line)
    if batch:
        yield batch


_DIM, _BOLD, _RED, _GREEN, _YELLOW, _BLUE, _MAGENTA, _CYAN = (f"\x1b[{n}m" for n in (2, 1, 31, 32, 33, 34, 35, 36))
_RESET = "\x1b[0m"
_COLOR_OF = {"debug": _GREEN, "info": _GREEN, "warning": _YELLOW, "error": _RED, "critical": _RED}


class Log:
    """Our lines: a text, and values by their names."""

    def debug(self, text: str, **values: Any) -> None:
        self.at(logging.DEBUG, text, values)

    def info(self, text: str, **values: Any) -> None:
        self.at(logging.INFO, text, values)

    def warning(self, text: str, **values: Any) -> None:
        self.at(logging.WARNING, text, values)

    def error(self, text: str, **values: Any) -> None:
        self.at(logging.ERROR, text, values)

    def exception(self, text: str, **values: Any) -> None:
        """With the traceback of the exception that is being handled."""
        self.at(logging.ERROR, text, values, sys.exception())

    def at(self, level: int, text: str, values: dict[str, Any], error: BaseException | None = None) -> None:
        if level >= _lowest_level:
            _write(level, text, values, error)


log = Log()


class _OfLibraries(logging.Handler):
    """What libraries log, in our form."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        log.at(record.levelno, record.getMessage(), {"logger": record.name}, error)


@dataclass(frozen=True, slots=True)
class Style:
    """Which lines, and how they look."""

    level: str = "info"
    as_json: bool = False
    in_colors: bool = False


_writer: Writer | None = None
_style = Style()
_lowest_level = logging.INFO


def style() -> Style:
    """Of this process: what `configure` was told."""
    return _style


def configure(level: str, as_json: bool) -> Writer:
    """Once per process. What is queued is written when the process ends, unless os._exit ends it."""
    global _writer, _style, _lowest_level
    # without a stderr its number belongs to the next file or connection that was opened
    fd = sys.stderr.fileno() if sys.stderr is not None else os.open(os.devnull, os.O_WRONLY)
    writer = _writer = Writer(fd)
    _style = Style(level, as_json, in_colors=os.isatty(fd))
    _lowest_level = logging.getLevelNamesMapping()[level.upper()]
    atexit.register(writer.close)
    logging.basicConfig(handlers=[_OfLibraries()], level=logging.WARNING, force=True)
    # uvicorn reports every malformed request as a warning of its own: ours are answered, not logged
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.captureWarnings(True)
    _catch_exceptions()
    return writer


def _write(level: int, text: str, values: dict[str, Any], error: BaseException | None = None) -> None:
    """Without `configure` the line is on stderr before anything else happens."""
    name = logging.getLevelName(level).lower()
    trace = "" if error is None else "".join(traceback.format_exception(error)).rstrip("\n")
    line = _json(name, text, values, trace) if _style.as_json else _readable(name, text, values, trace)
    if _writer is None:
        print(line, file=sys.stderr, flush=True)
    else:
        _writer.msg(line)


def _json(level: str, text: str, values: dict[str, Any], trace: str) -> str:
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    fields = {**values, "event": text, "level": level, "timestamp": now}
    return json.dumps({**fields, "exception": trace} if trace else fields, default=repr)


def _readable(level: str, text: str, values: dict[str, Any], trace: str) -> str:
    """Names of files and models may hold what a terminal obeys, or a line that looks like one of ours."""
    text, values = printable(text), {name: _shown(value) for name, value in values.items()}
    logger = values.pop("logger", None)
    parts = [
        _painted(datetime.now().strftime("%H:%M:%S"), _DIM),
        f"[{_painted(f'{level:9}', _COLOR_OF.get(level, '') + _BOLD)}]",
        _painted(text, _BOLD),
        *([] if logger is None else [f"[{_painted(logger, _BOLD + _BLUE)}]"]),
        *(f"{_painted(name, _CYAN)}={_painted(value, _MAGENTA)}" for name, value in values.items()),
    ]
    return " ".join(parts) + ("\n" + trace if trace else "")


def _shown(value: Any) -> str:
    if not isinstance(value, str):
        return repr(value)
    value = printable(value)
    return repr(value) if set(value) & set(" \t=\r\n\"'") else value


def _painted(text: str, style: str) -> str:
    return f"{style}{text}{_RESET}" if _style.in_colors else text


def _catch_exceptions() -> None:
    """The interpreter would write these to stderr itself, and wait there."""

    def uncaught(kind: type[BaseException], error: BaseException, trace: object) -> None:
        log.at(logging.CRITICAL, "nobody caught an exception, and the process ends", {}, error)

    def in_thread(args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, SystemExit):
            log.at(logging.ERROR, "a thread ended by a bug", {}, args.exc_value)

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        log.at(logging.ERROR, f"{args.err_msg or 'Exception ignored in'}: {args.object!r}", {}, args.exc_value)

    sys.excepthook, threading.excepthook, sys.unraisablehook = uncaught, in_thread, unraisable


def say(text: str) -> None:
    """For people who wait: a line of the log at level info, or plain in a command that keeps none."""
    if _writer is None:
        print(text, file=sys.stderr, flush=True)
    else:
        log.info(text)


def answer(text: str, **values: Any) -> None:
    """What the program was started to say, in the form of the log and whatever its level."""
    _write(logging.INFO, text, values)


def last_words(sentence: str) -> None:
    """Why the program ends: a line on stderr, whatever the level; it is JSON where the log is."""
    if _writer is None:
        print(sentence, file=sys.stderr, flush=True)
    elif _style.as_json:
        log.error(sentence)
    else:
        _writer.msg(sentence)


def forward(fd: int, source: str) -> threading.Thread:
    """Make lines of our log of what comes from `fd`, a child's stderr, until its end: JSON as it is, and in JSON what
    libraries and the C runtime write there by themselves. In a thread, which closes the descriptor."""
    thread = threading.Thread(target=_forward, args=(fd, source), name=f"log of {source}", daemon=True)
    thread.start()
    return thread


def _forward(fd: int, source: str) -> None:
    assert _writer is not None
    with open(fd, encoding="utf-8", errors="backslashreplace") as stream:
        while line := stream.readline(MAX_QUEUED_BYTES // 4):
            line = line.rstrip()
            if _is_object(line):
                _writer.msg(line)
            elif line:
                log.warning(line, logger=source)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def num_dropped() -> int:
    """Lines of this process that were not written, in total."""
    return 0 if _writer is None else _writer.num_dropped
