"""The server's side of the process that encodes and renders (`text/worker.py`).

    text = TextProcess(folder, template=None, model_name="")
    tokens, facts = await text.start()
    ids = await text.render(messages, ...)

What is asked is answered in its order. Who does not wait for an answer any more costs nothing but its time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_api.child import child_command
from gptq_api.errors import UserError
from gptq_api.frames import FrameBuffer, WireError, frame, read_payload
from gptq_api.text.chat import ChatTemplateError, TemplateFacts
from gptq_api.text.tokenizer_config import TokenizerError
from gptq_api.text.tokens import Tokens
from gptq_api.text.wire import (
    LOADING,
    NUMBER,
    Answer,
    Died,
    Encode,
    Ids,
    Load,
    Loaded,
    Refused,
    Render,
    Request,
    Text,
    decode_answer,
    encode_load,
    encode_request,
)
from gptq_api.text.worker import ENCODE_SIGNAL, LOAD_S, RENDER_SIGNAL, encode_limit, render_limit
from gptq_api.types import unpack_ids

SILENCE_S, SILENCE_FACTOR = 20.0, 10.0
"""A process that was stopped from outside is given up after this, and so many times its processor time, on the clock"""


class TextError(UserError):
    """This text or these messages cost more than a request may; half a sentence about what was too much."""


class TextProcessGone(UserError):
    """The process cannot be started again."""


@dataclass(slots=True)
class _Asked:
    number: int
    payload: bytes
    limit_s: float
    answer: asyncio.Future[Answer]


class TextProcess:
    """Owns the process. A new one is started where the old one is gone altogether."""

    def __init__(self, folder: Path, *, template: Path | str | None = None, model_name: str = "") -> None:
        self._load = Load(str(folder), None if template is None else str(template), model_name)
        self._asked: deque[_Asked] = deque()
        self._connection: _Link | None = None
        self._starting = asyncio.Lock()
        self._last_number = LOADING

    async def start(self) -> tuple[Tokens, TemplateFacts]:
        """Raises TokenizerError, ChatTemplateError: a sentence for whoever starts the server."""
        loaded = await self._start()
        assert loaded.facts is not None
        return Tokens(loaded.table), loaded.facts

    async def encode(
        self, texts: Sequence[str], *, add_bos: bool = False, parse_special: bool = False
    ) -> list[list[int]]:
        """`Tokenizer.encode` of each. Raises TextError, TextProcessGone."""
        request = Encode(list(texts), add_bos, parse_special)
        answer = await self._ask(request, encode_limit(sum(map(len, texts))))
        assert isinstance(answer, Ids)
        return [unpack_ids(ids) for ids in answer.ids]

    async def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """`ChatTemplate.render`. Raises ChatTemplateError, TextError, TextProcessGone."""
        request = Render(messages, add_generation_prompt, continue_final_message, dict(variables or {}))
        answer = await self._ask(request)
        assert isinstance(answer, Ids)
        return unpack_ids(answer.ids[0])

    async def render_text(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """`ChatTemplate.render_text`. Raises as `render` does."""
        request = Render(messages, add_generation_prompt, continue_final_message, dict(variables or {}), as_text=True)
        answer = await self._ask(request)
        assert isinstance(answer, Text)
        return answer.text

    def close(self) -> None:
        """End the process. Whoever still waits gets TextProcessGone."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.end()
        self._fail(TextProcessGone("the server is shutting down"))

    async def _ask(self, request: Request, limit_s: float | None = None) -> Answer:
        data = encode_request(request)
        if limit_s is None:
            limit_s = render_limit(len(data)) + encode_limit(len(data))
        self._last_number += 1
        payload = NUMBER.pack(self._last_number) + data
        asked = _Asked(self._last_number, payload, limit_s, asyncio.get_running_loop().create_future())
        if self._connection is None or self._starting.locked():
            async with self._starting:  # one starts it, the others wait
                if self._connection is None:
                    await self._restart()
        assert self._connection is not None
        self._asked.append(asked)
        self._connection.send(payload)
        if len(self._asked) == 1:
            self._connection.watch(asked.limit_s)
        answer = await asked.answer
        match answer:
            case Died(signal):
                raise TextError(_why(signal))
            case Refused(message, "render"):
                raise ChatTemplateError(message)
            case Refused(message, _):
                raise TextError(message)
        return answer

    async def _start(self) -> Loaded:
        connection, answer = await _started(self, self._load)
        match answer:
            case Loaded():
                self._connection = connection
                return answer
            case Refused(message, _):
                connection.end()
                raise TokenizerError(message)
            case _:
                connection.end()
                raise TokenizerError(_broken(self._load.folder, connection.process))

    async def _restart(self) -> None:
        try:
            await self._start()
        except (UserError, OSError) as error:
            raise TextProcessGone(f"the tokenizer's process cannot be started again: {error}") from None

    def _answered(self, connection: _Link, payload: bytes) -> None:
        if connection is not self._connection:
            return
        number, answer = decode_answer(payload)
        if not self._asked or number < self._asked[0].number:
            return  # the worker was ended behind its answer
        asked = self._asked.popleft()
        if number != asked.number:
            raise WireError(f"answer {number} where {asked.number} was asked")
        if not asked.answer.done():
            asked.answer.set_result(answer)
        connection.watch(self._asked[0].limit_s if self._asked else None)

    def _lost(self, connection: _Link) -> None:
        """The whole process is gone or silent: the request it was at gets an error, the others are asked again."""
        if connection is not self._connection:
            return
        self._connection = None
        connection.end()
        if self._asked and not (first := self._asked.popleft()).answer.done():
            first.answer.set_result(Died(0))
        left, self._asked = list(self._asked), deque()
        if left:
            task = asyncio.ensure_future(self._ask_again(left))
            _tasks.add(task)
            task.add_done_callback(_tasks.discard)

    async def _ask_again(self, left: list[_Asked]) -> None:
        try:
            async with self._starting:
                if self._connection is None:
                    await self._restart()
        except TextProcessGone as error:
            for asked in left:
                if not asked.answer.done():
                    asked.answer.set_exception(error)
            return
        assert self._connection is not None
        for asked in left:
            self._asked.append(asked)
            self._connection.send(asked.payload)
        self._connection.watch(self._asked[0].limit_s)

    def _fail(self, error: TextProcessGone) -> None:
        while self._asked:
            if not (asked := self._asked.popleft()).answer.done():
                asked.answer.set_exception(error)


_tasks: set[asyncio.Task[None]] = set()


def _why(signal: int) -> str:
    if signal == RENDER_SIGNAL:
        return "the chat template takes too long over these messages"
    if signal == ENCODE_SIGNAL:
        return "the tokenizer takes too long over this text"
    if signal == 0:
        return "the tokenizer's process did not answer"
    if signal < 0:
        return f"the tokenizer's process ended over it (exit status {-signal})"
    return f"the tokenizer's process died of it (signal {signal}), as it does where there is not enough memory"


def _broken(folder: str, process: subprocess.Popen[bytes]) -> str:
    status = process.poll()
    if status == -RENDER_SIGNAL:
        return f"the tokenizer or the chat template of {folder} takes more than {LOAD_S:g} s to load"
    how = f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"
    return f"the tokenizer or the chat template of {folder} ends the process that loads them ({how})"


def _spawn(load: Load) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        command = child_command("gptq_api.text.worker", str(theirs.fileno()), heard=False)
        # A panic of the tokenizers library writes to stderr what is in the answer anyway
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return process, ours


def _end(process: subprocess.Popen[bytes]) -> None:
    """It and its worker."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, 9)
    process.wait()


async def _started(owner: TextProcess, load: Load) -> tuple[_Link, Answer | None]:
    """A process, and its first answer; None where it died over it."""
    loop = asyncio.get_running_loop()
    process, ours = _spawn(load)
    first: asyncio.Future[Answer | None] = loop.create_future()
    connection = _Link(owner, process, first)
    try:
        await loop.create_connection(lambda: connection, sock=ours)
        connection.send(encode_load(load))
        answer = await first
    except BaseException:
        connection.end()
        raise
    return connection, answer


class _Link(asyncio.Protocol):
    """Bytes from the process -> answers."""

    def __init__(
        self, owner: TextProcess, process: subprocess.Popen[bytes], first: asyncio.Future[Answer | None]
    ) -> None:
        self.process = process
        self._owner, self._first, self._frames = owner, first, FrameBuffer()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._frames.feed(data):
                if self._first.done():
                    self._owner._answered(self, payload)
                else:
                    self._first.set_result(decode_answer(payload)[1])
        except WireError:
            self._owner._lost(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._first.done():
            self.process.wait()  # it closed the socket by its end
            self._first.set_result(None)
        self._owner._lost(self)

    def send(self, payload: bytes) -> None:
        assert self._transport is not None
        self._transport.write(frame(payload))

    def watch(self, limit_s: float | None) -> None:
        """Look for the answer to a request that may take so much processor time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if limit_s is not None:
            seconds = SILENCE_S + SILENCE_FACTOR * limit_s
            self._timer = asyncio.get_running_loop().call_later(seconds, self._owner._lost, self)

    def end(self) -> None:
        self.watch(None)
        if self._transport is not None:
            self._transport.abort()
        if not self._ended:
            self._ended = True
            _end(self.process)


class BlockingTokenizer(Tokens):
    """The same process for whoever has no event loop: a tokenizer whose `encode` is asked for. Any thread."""

    def __init__(self, folder: Path) -> None:
        """Raises TokenizerError."""
        self._process, self._sock = _spawn(load := Load(str(folder), None, "", with_template=False))
        self._lock = threading.Lock()
        answer = self._exchange(encode_load(load))
        if isinstance(answer, Refused):
            raise TokenizerError(answer.message)
        if not isinstance(answer, Loaded):
            self._process.wait()
            raise TokenizerError(_broken(str(folder), self._process))
        super().__init__(answer.table)

    def encode(self, text: str) -> list[int]:
        """Raises TextError where it costs too much, or the process is gone."""
        with self._lock:
            answer = self._exchange(NUMBER.pack(1) + encode_request(Encode([text])))
        if isinstance(answer, Ids):
            return unpack_ids(answer.ids[0])
        raise TextError(_why(answer.signal) if isinstance(answer, Died) else "the tokenizer's process is gone")

    def close(self) -> None:
        self._sock.close()
        _end(self._process)

    def _exchange(self, payload: bytes) -> Answer | None:
        try:
            self._sock.sendall(frame(payload))
            answer = read_payload(self._sock)
        except OSError:
            return None
        return None if answer is None else decode_answer(answer)[1]
