"""The server's side of the child process that tries grammars out (`grammar/worker.py`)."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import OrderedDict
from collections.abc import Sequence

from gptq_api.child import child_command
from gptq_api.grammar.worker import LENGTH, MAX_S

SILENCE_S = 30.0
"""A process that was stopped from outside is given up after this"""
_START_TIMEOUT_S = 30.0
_EXIT_S = 10.0
_MAX_KEPT = 1024
"""answers that are remembered"""
_NOBODY, _MEMORY = "nobody could try it out", "it takes too much memory to compile"
_CHANCE = (_NOBODY, _MEMORY)
"""which say as much of the process as of the grammar, and are not remembered"""


class GrammarChecker:
    """`await check(grammar)`; the process is started by the first that needs it and stays. One grammar at a time."""

    def __init__(self, control_tokens: Sequence[str]) -> None:
        """`control_tokens`: names a grammar may use, such as <|python_tag|>."""
        self._names = "\0".join(control_tokens)
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._known: OrderedDict[str, str] = OrderedDict()

    async def check(self, grammar: str) -> str:
        """Why a grammar cannot be used, in llguidance's words or ours; "" where it can."""
        found = self._known.get(grammar)
        if found is None:
            async with self._turn:
                found = await self._ask(grammar)
        if found not in _CHANCE:
            self._known[grammar] = found
            self._known.move_to_end(grammar)
        while len(self._known) > _MAX_KEPT:
            self._known.popitem(last=False)
        return found

    async def _ask(self, grammar: str) -> str:
        try:
            process = await self._running()
            async with asyncio.timeout(SILENCE_S):
                return await _exchange(process, grammar)
        except TimeoutError:
            self.close()
            return _NOBODY
        except (OSError, asyncio.IncompleteReadError):
            ended, self._process = self._process, None
            # not killed, which would reap it beside asyncio's back, and how it ended would be lost
            if ended is not None and await _ended(ended) == -signal.SIGPROF:
                return f"it takes more than {MAX_S:g} s to compile"
            return _MEMORY
        except asyncio.CancelledError:  # who waits next must not read our answer
            self.close()
            raise

    async def _running(self) -> asyncio.subprocess.Process:
        process = self._process
        if process is None or process.returncode is not None:
            process = self._process = await asyncio.create_subprocess_exec(
                *child_command("gptq_api.grammar.worker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
            async with asyncio.timeout(_START_TIMEOUT_S):
                await _exchange(process, self._names)
        return process

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            _kill(process)


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


async def _ended(process: asyncio.subprocess.Process) -> int:
    """The exit status of a process that closed its end of the pipe."""
    try:
        async with asyncio.timeout(_EXIT_S):
            return await process.wait()
    except TimeoutError:
        _kill(process)
        return await process.wait()


async def _exchange(process: asyncio.subprocess.Process, text: str) -> str:
    assert process.stdin is not None and process.stdout is not None
    data = text.encode()
    process.stdin.write(LENGTH.pack(len(data)) + data)
    await process.stdin.drain()
    (size,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
    return (await process.stdout.readexactly(size)).decode()
