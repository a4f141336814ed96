"""One life of the engine: its process and our end of the socket, from the start to the exit status."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable

from gptq_api import frames
from gptq_api.child import child_command
from gptq_api.config import EngineSettings
from gptq_api.engine import wire
from gptq_api.engine.options import EngineOptions
from gptq_api.errors import UserError
from gptq_api.logs import Style, forward, style
from gptq_api.types import Abort, Add, Failed, FromEngine, Ready, StepOutput

_EXIT_S = 5.0
"""How long a process whose socket is closed has to leave"""
_LOOK_S = 0.01
_LAST_LINES_LOOKS = 50


class EngineFailed(UserError):
    """The engine could not start; the text is one sentence for the user."""


class EngineLost(EngineFailed):
    """Its process ended while it loaded the model, without saying why; another try may succeed."""


class EngineLife:
    """Started once. Whatever ends it, the process is gone after `ended` has been awaited."""

    def __init__(
        self, settings: EngineSettings, deliver: Callable[[StepOutput], None], lost: Callable[[], None]
    ) -> None:
        """`deliver` gets the output of every step. `lost` is called when the engine is gone without having been asked
        to, once it was ready."""
        self._settings, self._deliver, self._lost = settings, deliver, lost
        self._ready: asyncio.Future[Ready | None] = asyncio.get_running_loop().create_future()
        self._started = self._stopping = self._gone = False
        self._log: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None

    @property
    def is_running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._process.poll() is None

    async def start(self) -> Ready:
        """Start the process and wait until the model is loaded. Raises EngineFailed; then, or when it is cancelled, the
        process is gone."""
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                lines = Style(self._settings.log_level, self._settings.log_json)
                command = child_command("gptq_api.engine.process", str(theirs.fileno()), style=lines)
                # not in a thread: cancelled there, it would start the engine with a descriptor that is closed already
                self._spawn(command, theirs.fileno())
            loop = asyncio.get_running_loop()
            self._transport, _ = await loop.create_connection(lambda: _Connection(self._receive, self._end), sock=ours)
            self._transport.write(frames.frame(EngineOptions.of(self._settings).encoded()))
            ready = await self._ready
        except EngineFailed:
            await self.stop()
            raise
        except OSError as error:  # no descriptors, no memory, no processes
            self.kill()
            await self.ended()
            raise EngineLost(f"the engine process cannot be started: {error.strerror or error}") from None
        except BaseException:  # it loads, for nobody
            self.kill()
            await self.ended()
            raise
        if ready is None or self._gone:
            raise EngineLost(f"the engine process {await self.ended()} while it loaded the model")
        self._started = True
        return ready

    def send(self, message: Add | Abort) -> None:
        assert self._transport is not None
        self._transport.write(wire.encode(message))

    async def stop(self, within_s: float = _EXIT_S) -> None:
        """Close the socket, which ends the engine, and wait for that; kill it after `within_s`."""
        self._stopping = True
        if self._transport is not None:
            self._transport.close()
        await self.ended(within_s)

    def kill(self) -> None:
        """At once, also a process that is stopped. Where `stop` was not asked for, `lost` is called soon."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        if self._transport is not None:
            self._transport.abort()

    async def ended(self, within_s: float = _EXIT_S) -> str:
        """Wait for the end of a process that is leaving; kill it after `within_s`. How it ended, as in "the engine
        process was killed"."""
        process = self._process
        if process is None:
            return "was not started"
        deadline = time.monotonic() + within_s
        while process.poll() is None:  # a moment at the end of a life: no thread and no descriptor for it
            if time.monotonic() > deadline:
                process.kill()
            if time.monotonic() > deadline + _EXIT_S:
                return "cannot be killed: it hangs in the kernel"
            await asyncio.sleep(_LOOK_S)
        for _ in range(_LAST_LINES_LOOKS):
            if self._log is None or not self._log.is_alive():
                break
            await asyncio.sleep(_LOOK_S)
        return _ending(process.returncode)

    def _spawn(self, command: list[str], fd: int) -> None:
        """OpenMP threads that spin while they wait cost nothing on idle cores and a factor of 30 to 80 on busy ones,
        where they burn the time slice of the thread they wait for (measured: 4 against 350 tokens/s beside a busy
        process)."""
        env = {"OMP_WAIT_POLICY": "passive"} | os.environ
        # otherwise it has our stderr, which may be a terminal: loading shows a bar there
        reading, writing = os.pipe() if style().as_json else (None, None)
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=[fd],
                stdin=subprocess.DEVNULL,
                stderr=writing,
                env=env,
                start_new_session=True,
            )
        finally:
            if reading is not None and writing is not None:
                os.close(writing)
                self._log = forward(reading, "engine")

    def _receive(self, message: FromEngine) -> None:
        match message:
            case StepOutput():
                self._deliver(message)
            case Ready():
                if not self._ready.done():
                    self._ready.set_result(message)
            case Failed(text):
                if not self._ready.done():
                    self._ready.set_exception(EngineFailed(text))

    def _end(self) -> None:
        """The socket is closed."""
        self._gone = True
        if not self._ready.done():
            self._ready.set_result(None)
        elif self._started and not self._stopping:
            self._lost()


def _ending(status: int) -> str:
    if status >= 0:
        return f"left with exit status {status}"
    name = signal.Signals(-status).name if -status in {*signal.Signals} else f"signal {-status}"
    if -status == signal.SIGKILL:
        return f"was killed ({name}, which the kernel sends where memory has run out)"
    return f"was ended by {name}"


class _Connection(asyncio.Protocol):
    """Bytes from the engine -> messages."""

    def __init__(self, receive: Callable[[FromEngine], None], end: Callable[[], None]) -> None:
        self._receive, self._end, self._frames = receive, end, frames.FrameBuffer()

    def data_received(self, data: bytes) -> None:
        for payload in self._frames.feed(data):
            self._receive(wire.decode_from_engine(payload))

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
