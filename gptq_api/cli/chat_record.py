"""What a chat keeps of itself: how fast the answers were, the conversation in a file, and the lines that were typed."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

from prompt_toolkit.completion import Completer, PathCompleter, WordCompleter
from prompt_toolkit.completion import Completion as Choice
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from gptq_api.cli.chat_models import Message, Report


class Timer:
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

    @property
    def first_s(self) -> float | None:
        return None if self._first is None else self._first - self._start

    def rate(self, num_tokens: int) -> float | None:
        """Tokens a second behind the first text; None where there were none."""
        if self._first is None or num_tokens <= self._num_first or self._last <= self._first:
            return None
        return (num_tokens - self._num_first) / (self._last - self._first)

    def summary(self, num_tokens: int) -> str:
        if self.first_s is None:
            return f"no text, {num_tokens} tokens"
        rate = self.rate(num_tokens)
        parts = [
            f"{num_tokens} tokens",
            *([f"{rate:.1f} tokens/s"] if rate else []),
            f"first after {self.first_s:.2f} s",
        ]
        return ", ".join(parts)


@dataclass
class Stats:
    """Of all answers of a chat."""

    answers: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    firsts_s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def add(self, report: Report, timer: Timer) -> None:
        self.answers += 1
        self.tokens += report.num_tokens
        self.drafted += report.num_drafted
        self.accepted += report.num_accepted
        if timer.first_s is not None:
            self.firsts_s.append(timer.first_s)
        if rate := timer.rate(report.num_tokens):
            self.rates.append(rate)

    def text(self) -> str:
        if not self.answers:
            return "no answers yet"
        lines = [f"{self.answers} answers, {self.tokens} tokens"]
        if self.rates:
            lines.append(f"tokens/s: median {median(self.rates):.1f}, {min(self.rates):.1f} to {max(self.rates):.1f}")
        if self.firsts_s:
            lines.append(
                f"first text after {fmean(self.firsts_s):.2f} s on average, {max(self.firsts_s):.2f} s at most"
            )
        if self.drafted:
            lines.append(f"{self.accepted} of {self.drafted} drafted tokens accepted")
        return "\n".join(lines)


def save(file: Path, messages: list[Message]) -> str:
    """Write a conversation: JSON that the API takes as a body's messages, or Markdown where the name ends with .md.
    Returns the sentence to show."""
    if not messages:
        return "nothing has been said yet: nothing is written"
    if file.suffix == ".md":
        text = "\n\n".join(f"**{message['role']}**\n\n{message['content']}" for message in messages) + "\n"
    else:
        text = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
    try:
        with file.expanduser().open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        return f"{file} is there already; name another file"
    except OSError as error:
        return f"{file} cannot be written: {error.strerror}"
    return f"{len(messages)} messages are in {file}"


def history() -> History:
    """Lines of earlier chats, in a file of this user's; of this chat alone where there can be none."""
    home = os.environ.get("XDG_STATE_HOME") or Path("~").expanduser() / ".local" / "state"
    file = Path(home, "gptq-api", "chat_history")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))


class CommandCompleter(Completer):
    """Tab: commands at a slash, files behind /save."""

    def __init__(self, commands: list[str]) -> None:
        self._commands = WordCompleter(commands, sentence=True)
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: object) -> object:  # type: ignore[override]
        text = document.text_before_cursor
        if text.startswith("/save "):
            rest = Document(text.removeprefix("/save "))
            return list(self._paths.get_completions(rest, complete_event))  # type: ignore[arg-type]
        found: list[Choice] = []
        if text.startswith("/"):
            found = list(self._commands.get_completions(document, complete_event))  # type: ignore[arg-type]
        return found
