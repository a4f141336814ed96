"""Log lines on stderr: readable ones, or one JSON object each. A log that cannot be written never fails a request."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog


class Lines:
    """Writes lines; counts those that could not be written (disk full, reader gone)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.num_dropped = 0

    def msg(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            self.num_dropped += 1

    debug = info = warning = error = critical = exception = log = msg


class _ToStructlog(logging.Handler):
    """What libraries log, in our form."""

    def emit(self, record: logging.LogRecord) -> None:
        exc_info = record.exc_info if record.exc_info and record.exc_info[0] else None
        structlog.get_logger().log(record.levelno, record.getMessage(), logger=record.name, exc_info=exc_info)


def configure(level: str, as_json: bool) -> Lines:
    """Once per process."""
    lines = Lines(sys.stderr)
    colors = sys.stderr.isatty()
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=colors, pad_event_to=0, sort_keys=False, exception_formatter=structlog.dev.plain_traceback
        )
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S", utc=as_json),
            *([structlog.processors.format_exc_info] if as_json else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=lambda *args: lines,
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_ToStructlog()], level=logging.WARNING, force=True)
    # uvicorn reports every malformed request as a warning of its own: ours are answered, not logged
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    return lines
