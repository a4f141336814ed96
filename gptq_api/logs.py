"""Log lines on stderr: readable ones, or one JSON object each. Logging never waits and never fails.

structlog, logging, warnings, uncaught exceptions ─> a bounded queue ─> one thread ─> write(2)
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
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from gptq_api.errors import printable

_has_rich = "rich" in sys.modules
if not _has_rich:
    sys.modules["rich"] = None  # type: ignore[assignment]  # structlog would import it: 0.1 s for tracebacks not ours
import structlog  # noqa: E402

if not _has_rich:
    del sys.modules["rich"]

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

    debug = info = warning = error = critical = exception = log = msg

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


class _ToStructlog(logging.Handler):
    """What libraries log, in our form."""

    def emit(self, record: logging.LogRecord) -> None:
        exc_info = record.exc_info if record.exc_info and record.exc_info[0] else None
        structlog.get_logger().log(record.levelno, record.getMessage(), logger=record.name, exc_info=exc_info)


@dataclass(frozen=True, slots=True)
class Style:
    """Which lines, and how they look."""

    level: str = "info"
    as_json: bool = False


_writer: Writer | None = None
_style = Style()


def style() -> Style:
    """Of this process: what `configure` was told."""
    return _style


def configure(level: str, as_json: bool) -> Writer:
    """Once per process. What is queued is written when the process ends, unless os._exit ends it."""
    global _writer, _style
    _style = Style(level, as_json)
    # without a stderr its number belongs to the next file or connection that was opened
    fd = sys.stderr.fileno() if sys.stderr is not None else os.open(os.devnull, os.O_WRONLY)
    writer = _writer = Writer(fd)
    atexit.register(writer.close)
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=os.isatty(fd), pad_event_to=0, sort_keys=False, exception_formatter=structlog.dev.plain_traceback
        )
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S", utc=as_json),
            *([structlog.processors.format_exc_info] if as_json else [_escaped]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=lambda *args: writer,
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_ToStructlog()], level=logging.WARNING, force=True)
    # uvicorn reports every malformed request as a warning of its own: ours are answered, not logged
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.captureWarnings(True)
    _catch_exceptions()
    return writer


def _escaped(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Names of files and models may hold what a terminal obeys, or a line that looks like one of ours."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = printable(value)
    return event


def _catch_exceptions() -> None:
    """The interpreter would write these to stderr itself, and wait there."""
    log = structlog.get_logger()

    def uncaught(kind: type[BaseException], error: BaseException, trace: object) -> None:
        log.critical("nobody caught an exception, and the process ends", exc_info=error)

    def in_thread(args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, SystemExit):
            log.error("a thread ended by a bug", exc_info=args.exc_value)

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        log.error(f"{args.err_msg or 'Exception ignored in'}: {args.object!r}", exc_info=args.exc_value)

    sys.excepthook, threading.excepthook, sys.unraisablehook = uncaught, in_thread, unraisable


def say(text: str) -> None:
    """For people who wait: a line of the log at level info, or plain in a command that keeps none."""
    if _writer is None:
        print(text, file=sys.stderr, flush=True)
    else:
        structlog.get_logger().info(text)


def answer(text: str, **values: Any) -> None:
    """What the program was started to say, in the form of the log and whatever its level."""
    structlog.wrap_logger(_writer, wrapper_class=structlog.make_filtering_bound_logger(logging.INFO)).info(
        text, **values
    )


def last_words(sentence: str) -> None:
    """Why the program ends: a line on stderr, whatever the level; it is JSON where the log is."""
    if _writer is None:
        print(sentence, file=sys.stderr, flush=True)
    elif _style.as_json:
        structlog.get_logger().error(sentence)
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
    log = structlog.get_logger()
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
