"""`gptq-api chat`: talk to a checkpoint, or to a running server with --url, in the terminal.

On a terminal: line editing, history with the arrow keys, ^C stops an answer. With piped input every line is a message
and standard output holds the answers only; notes go to standard error.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from typing import Any, TextIO, cast

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import FormattedText
from rich.console import Console
from rich.text import Text

from gptq_api import exits
from gptq_api.cli.chat_models import ChatError, ChatModel, LocalModel, Message, RemoteModel, Report
from gptq_api.cli.output import fail
from gptq_api.config import ChatSettings

HELP = """\
/reset        forget the conversation
/system TEXT  set the system prompt; without TEXT, remove it
/help         this list
/exit         leave, as ^D does; ^C stops an answer"""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Chat:
    """One conversation: who said what, and the reading and printing of it."""

    def __init__(self, settings: ChatSettings, model: ChatModel, *, interactive: bool) -> None:
        self._model = model
        self._interactive = interactive
        self._system = settings.system
        self._turns: list[Message] = []
        self._notes = Console(stderr=not interactive, highlight=False)
        self._session: PromptSession[str] | None = PromptSession() if interactive else None

    async def run(self) -> int:
        """Until the user leaves. Returns the exit status."""
        self._note(self._model.description)
        if self._interactive:
            self._note("/help lists the commands, ^D leaves")
        while (line := await self._read()) is not None:
            line = line.strip()
            if line in ("/exit", "/quit"):
                break
            if line.startswith("/"):
                self._command(line)
            elif line and not await self._turn(line):
                return exits.FAILED
        return exits.DONE

    async def _turn(self, line: str) -> bool:
        """One question and its answer. False when the program should end with an error."""
        self._turns.append({"role": "user", "content": line})
        system = [{"role": "system", "content": self._system}] if self._system else []
        report, timer = Report(), _Timer()
        text, stopped, error = await self._stream([*system, *self._turns], report, timer)
        if report.num_dropped:
            del self._turns[: report.num_dropped]
            self._note(f"the context is full: the oldest {report.num_dropped} messages are forgotten")
        if text:
            self._turns.append({"role": "assistant", "content": text})
        else:
            self._turns.pop()
        if error is not None:
            self._fail(error)
            return self._interactive and not error.fatal
        ending = "stopped" if stopped else {"length": "cut at the token limit"}.get(report.finish_reason or "", "")
        drafted = f"{report.num_accepted} of {report.num_drafted} drafted tokens accepted" if report.num_drafted else ""
        self._note(", ".join(filter(None, (timer.summary(report.num_tokens), drafted, ending))))
        return True

    async def _stream(
        self, messages: list[Message], report: Report, timer: _Timer
    ) -> tuple[str, bool, ChatError | None]:
        """Prints the answer as it comes. Returns (text, whether ^C stopped it, what went wrong)."""
        pieces: list[str] = []

        async def show() -> None:
            async with contextlib.aclosing(cast(Any, self._model.answer(messages, report))) as answer:
                async for piece in answer:
                    timer.tick(report.num_tokens)
                    pieces.append(piece)
                    sys.stdout.write(_CONTROL.sub("", piece))  # a model's escape codes are not for this terminal
                    sys.stdout.flush()

        loop = asyncio.get_running_loop()
        task = asyncio.create_task(show())
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        stopped, error = False, None
        try:
            await task
        except asyncio.CancelledError:
            stopped = True
        except ChatError as failure:
            error = failure
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        if pieces or error is None:
            print(flush=True)
        return "".join(pieces), stopped, error

    async def _read(self) -> str | None:
        """The next line; None at the end of the input, or for ^C twice at an empty prompt."""
        if self._session is None:
            # No answer is running, so nothing else needs the loop; asyncio's own ^C handler would not end the read.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            return sys.stdin.readline() or None
        interrupted = False
        while True:
            try:
                return await self._session.prompt_async(FormattedText([("bold", "> ")]))
            except EOFError:
                return None
            except KeyboardInterrupt:
                empty = not self._session.default_buffer.text
                if empty and interrupted:
                    return None
                interrupted = empty
                if empty:
                    self._note("^C again or ^D leaves")

    def _command(self, line: str) -> None:
        name, _, text = line.partition(" ")
        match name:
            case "/reset":
                self._turns.clear()
                self._note("the conversation is forgotten")
            case "/system":
                self._system = text.strip() or None
                self._note(f"system prompt: {self._system}" if self._system else "no system prompt")
            case "/help":
                self._note(HELP)
            case _:
                self._note(f"{name} is not a command\n{HELP}")

    def _note(self, text: str) -> None:
        self._notes.print(Text(_CONTROL.sub("", text), style="dim"), soft_wrap=True)

    def _fail(self, error: ChatError) -> None:
        fail("chat", error)


class _Timer:
    """Time to first text and the rate after it."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first: float | None = None
        self._num_first = 0  # tokens that came with the first text
        self._last = self._start

    def tick(self, num_tokens: int) -> None:
        """Text has come, with which there are so many tokens."""
        self._last = time.perf_counter()
        if self._first is None:
            self._first, self._num_first = self._last, num_tokens

    def summary(self, num_tokens: int) -> str:
        if self._first is None:
            return f"no text, {num_tokens} tokens"
        parts = [f"{num_tokens} tokens", f"first after {self._first - self._start:.2f} s"]
        if num_tokens > self._num_first and self._last > self._first:
            parts.insert(1, f"{(num_tokens - self._num_first) / (self._last - self._first):.1f} tokens/s")
        return ", ".join(parts)


async def _chat(settings: ChatSettings, *, interactive: bool) -> int:
    model: ChatModel = LocalModel(settings) if settings.url is None else RemoteModel(settings)
    waiting = "connecting" if settings.url is not None else f"loading {settings.model_path}"
    try:
        with Console(stderr=True).status(waiting) if interactive else contextlib.nullcontext():
            await model.start()
        return await Chat(settings, model, interactive=interactive).run()
    finally:
        await model.stop()


def run(settings: ChatSettings) -> int:
    """Chat until the user leaves. Exit status: 0 left, 1 a sentence on standard error says what failed, 130 ^C."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIO) or hasattr(stream, "reconfigure"):
            cast(Any, stream).reconfigure(errors="replace")
    try:
        return asyncio.run(_chat(settings, interactive=interactive))
    except ChatError as error:
        fail("chat", error)
        return exits.FAILED
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except BrokenPipeError:  # nobody reads the answers any more; keep the interpreter's own flush from saying so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.FAILED
