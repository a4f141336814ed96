"""`gptq-api chat`: talk to a checkpoint, or to a running server with --url, in the terminal.

On a terminal: line editing, the history of earlier chats with the arrow keys, Tab, ^C stops an answer. With piped input
every line is a message; with a question on the command line that is the only one, and what is piped stands behind it.
Standard output holds the answers only then; notes go to standard error.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, TextIO, cast

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import FormattedText
from rich.console import Console
from rich.text import Text

from gptq_api import exits
from gptq_api.cli.chat_models import ChatError, ChatModel, LocalModel, Message, RemoteModel, Report
from gptq_api.cli.chat_record import CommandCompleter, Stats, Timer, history, save
from gptq_api.cli.chat_screen import Screen, plain
from gptq_api.cli.output import fail
from gptq_api.config import ChatSettings

HELP = """\
/regenerate   another answer to the last question
/reset        forget the conversation
/save FILE    write it down: JSON, or Markdown where FILE ends with .md
/stats        how many tokens there were, and how fast they came
/system TEXT  set the system prompt; without TEXT, remove it
/help         this list
/exit         leave, as ^D does; ^C stops an answer"""
COMMANDS = [line.split()[0] for line in HELP.splitlines()]


class Chat:
    """One conversation: who said what, and the reading and printing of it."""

    def __init__(self, settings: ChatSettings, model: ChatModel, *, interactive: bool) -> None:
        self._model = model
        self._interactive = interactive
        self._system = settings.system
        self._turns: list[Message] = []
        self._attempt = 0
        self._stats = Stats()
        self._notes = Console(stderr=not interactive, highlight=False)
        self._answers = Console(highlight=False)
        self._session: PromptSession[str] | None = None
        if interactive:
            self._session = PromptSession(
                history=history() if settings.history else None,
                completer=CommandCompleter(COMMANDS),
                complete_while_typing=False,
            )

    async def run(self) -> int:
        """Until the user leaves. Returns the exit status."""
        self._note(self._model.description)
        if self._interactive:
            self._note("/help lists the commands, ^D leaves")
        while (line := await self._read()) is not None:
            line = line.strip()
            if line in ("/exit", "/quit"):
                break
            question: str | None = line
            if line == "/regenerate":
                question = self._taken_back()
            elif line.startswith("/"):
                self._command(line)
                continue
            else:
                self._attempt = 0
            if question and not await self.turn(question):
                return exits.FAILED
        return exits.DONE

    def _taken_back(self) -> str | None:
        """The last question, whose answer is forgotten; None where there is none."""
        if len(self._turns) < 2:
            self._note("there is no answer yet that could be another one")
            return None
        self._attempt += 1
        self._turns.pop()
        return str(self._turns.pop()["content"])

    def _messages(self) -> list[Message]:
        system: list[Message] = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, *self._turns]

    async def turn(self, line: str) -> bool:
        """One question and its answer. False when the program should end with an error."""
        self._turns.append({"role": "user", "content": line})
        report, timer = Report(attempt=self._attempt), Timer()
        text, stopped, error = await self._stream(self._messages(), report, timer)
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
        self._stats.add(report, timer)
        ending = "stopped" if stopped else {"length": "cut at the token limit"}.get(report.finish_reason or "", "")
        drafted = f"{report.num_accepted} of {report.num_drafted} drafted tokens accepted" if report.num_drafted else ""
        self._note(", ".join(filter(None, (timer.summary(report.num_tokens), drafted, ending))))
        return True

    async def _stream(
        self, messages: list[Message], report: Report, timer: Timer
    ) -> tuple[str, bool, ChatError | None]:
        """Prints the answer as it comes. Returns (text, whether ^C stopped it, what went wrong)."""
        pieces: list[str] = []
        screen = None
        if self._interactive:
            has_colour = self._answers.color_system is not None and not self._answers.no_color
            screen = Screen(shutil.get_terminal_size().columns, has_colour)

        async def show() -> None:
            async with contextlib.aclosing(cast(Any, self._model.answer(messages, report))) as answer:
                async for piece in answer:
                    timer.tick(report.num_tokens)
                    pieces.append(piece)
                    sys.stdout.write(screen.feed(piece) if screen else plain(piece))
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
            print(screen.end() if screen else "", flush=True)
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
            case "/stats":
                self._note(self._stats.text())
            case "/save":
                file = text.strip()
                self._note(
                    save(Path(file), self._messages() if self._turns else [])
                    if file
                    else "/save FILE: the file's name is missing"
                )
            case "/help":
                self._note(HELP)
            case _:
                self._note(f"{name} is not a command\n{HELP}")

    def _note(self, text: str) -> None:
        self._notes.print(Text(plain(text), style="dim"), soft_wrap=True)

    def _fail(self, error: ChatError) -> None:
        fail("chat", error)


def _asked(question: str) -> str:
    """With what is piped behind it."""
    piped = "" if sys.stdin.isatty() else sys.stdin.read().strip()
    return f"{question}\n\n{piped}" if piped else question


async def _chat(settings: ChatSettings, *, interactive: bool) -> int:
    model: ChatModel = LocalModel(settings) if settings.url is None else RemoteModel(settings)
    waiting = "connecting" if settings.url is not None else f"loading {settings.model_path}"
    try:
        with Console(stderr=True).status(waiting) if interactive else contextlib.nullcontext():
            await model.start()
        chat = Chat(settings, model, interactive=interactive)
        if settings.question is not None:
            return exits.DONE if await chat.turn(_asked(settings.question)) else exits.FAILED
        return await chat.run()
    finally:
        await model.stop()


def run(settings: ChatSettings) -> int:
    """Chat until the user leaves. Exit status: 0 left, 1 a sentence on standard error says what failed, 130 ^C."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and settings.question is None
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
