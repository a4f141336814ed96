"""Models that think before they speak: `<think>...</think>` at the head of an answer; a prompt may have begun it."""

from __future__ import annotations

from gptq_api.text.parts import Parts, Reader
from gptq_api.text.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"


def thinks(tokenizer: Tokenizer, template: str) -> bool:
    """Whether a model does: its vocabulary has both marks, or its chat template (the source) writes them."""
    known = all(tokenizer.token_to_id(mark) is not None for mark in (OPEN, CLOSE))
    return known or CLOSE in template


def opened_by(tokenizer: Tokenizer, prompt: list[int]) -> bool:
    """Whether the answer to a prompt begins in the middle of thoughts."""
    return tokenizer.decode(prompt[-16:], skip_special=False).rstrip().endswith(OPEN)


class PlainReader:
    """A Reader for which all is content."""

    has_calls = False
    thinking = False

    def push(self, text: str) -> Parts:
        return Parts(content=text)

    def finish(self) -> Parts:
        return Parts()


class ThoughtReader:
    """A Reader of thoughts, and of what follows them by another one. White space around thoughts is not told."""

    def __init__(self, rest: Reader, *, opened: bool) -> None:
        """`opened`: whether the prompt ends with `<think>`."""
        self._rest = rest
        self._begun = opened
        self.thinking = opened
        self._held = ""
        self._blank = True  # nothing is told yet of what comes next

    @property
    def has_calls(self) -> bool:
        return self._rest.has_calls

    def push(self, text: str) -> Parts:
        if self._begun and not self.thinking and not self._blank:
            return self._rest.push(text)
        self._held += text
        parts = Parts()
        if not self._begun and not self._opens():
            return parts
        if self.thinking:
            parts.reasoning = self._thought()
        if not self.thinking and self._held:
            text = self._held.lstrip() if self._blank else self._held
            if text or not self._blank:
                self._held, self._blank = "", False
                parts += self._rest.push(text)
        return parts

    def finish(self) -> Parts:
        held, self._held = self._held, ""
        if self.thinking:
            return Parts(reasoning=held.rstrip() if not self._blank else held.strip())
        parts = self._rest.push(held) if held and not (self._begun and self._blank) else Parts()
        parts += self._rest.finish()
        return parts

    def _opens(self) -> bool:
        """Whether it is certain by now if the answer begins with thoughts."""
        text = self._held.lstrip()
        if text.startswith(OPEN):
            self._begun = self.thinking = True
            self._held = text.removeprefix(OPEN)
        elif OPEN.startswith(text):
            return False
        else:
            self._begun, self._blank = True, False
        return True

    def _thought(self) -> str:
        text = self._held.lstrip() if self._blank else self._held
        thought, closed, rest = text.partition(CLOSE)
        if closed:
            self.thinking, self._blank, self._held = False, True, rest
            return thought.rstrip()
        keep = next((n for n in range(min(len(text), len(CLOSE) - 1), 0, -1) if CLOSE.startswith(text[-n:])), 0)
        told = text[: len(text) - keep].rstrip()
        self._held = text[len(told) :]
        self._blank = self._blank and not told
        return told
