"""A model's text on a terminal: words are wrapped while they come, and markdown is coloured where there is colour. No
character is left out, so that what is copied is what the model wrote; none of its control characters gets through."""

from __future__ import annotations

import re

from prompt_toolkit.utils import get_cwidth

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_RESET, _BOLD, _CODE, _DIM = "\x1b[0m", "\x1b[1m", "\x1b[36m", "\x1b[2m"
_FENCE = re.compile(r"\s{0,3}(```|~~~)")
_HEADING = re.compile(r"#{1,6} ")
_MARKS = re.compile(r"(\*\*|`)")


def plain(text: str) -> str:
    """Without what terminals obey."""
    return CONTROL.sub("", text)


class Screen:
    """Feed it pieces; print what it returns. Words wait for the blank behind them."""

    def __init__(self, width: int, has_colour: bool) -> None:
        self._width, self._has_colour = max(width, 20), has_colour
        self._word = ""
        self._line = ""
        """of what was printed, as far as the model's own newline"""
        self._column = 0
        self._in_fence = self._in_code = self._in_bold = False

    def feed(self, piece: str) -> str:
        shown = []
        for char in plain(piece):
            if char in " \t\n":
                shown.append(self._flush())
                shown.append(self._blank(char))
            else:
                self._word += char
                if get_cwidth(self._word) >= self._width:  # a word that fits nowhere
                    shown.append(self._flush())
        return "".join(shown)

    def end(self) -> str:
        """What is left."""
        shown = self._flush()
        return shown + (_RESET if self._has_colour else "")

    def _blank(self, char: str) -> str:
        if char != "\n":
            self._line += char
            self._column += 1
            # A blank at the edge is printed; what follows it begins the next line.
            return char
        if _FENCE.match(self._line):
            self._in_fence = not self._in_fence
        self._line, self._column = "", 0
        if not self._in_fence:
            self._in_code = False
        reset = _RESET if self._has_colour else ""
        self._in_bold = False
        return f"{reset}\n"

    def _flush(self) -> str:
        word, self._word = self._word, ""
        if not word:
            return ""
        width, before = get_cwidth(word), ""
        if self._column and self._column + width > self._width and not self._in_fence:
            before, self._column = "\n", 0
        self._column = (self._column + width) % self._width if self._in_fence else self._column + width
        styled = self._styled(word) if self._has_colour else word
        self._line += word
        return before + styled

    def _styled(self, word: str) -> str:
        if self._in_fence or _FENCE.match(self._line + word):
            return f"{_DIM if _FENCE.match(self._line + word) else _CODE}{word}{_RESET}"
        if _HEADING.match(f"{self._line}{word} ") and not self._line.strip("# "):
            return f"{_BOLD}{word}{_RESET}"
        heading = bool(_HEADING.match(self._line))
        parts = []
        for part in _MARKS.split(word):
            if part == "`":
                self._in_code = not self._in_code
                parts.append(f"{_DIM}`{_RESET}")
            elif part == "**" and not self._in_code:
                self._in_bold = not self._in_bold
                parts.append(f"{_DIM}**{_RESET}")
            elif part:
                style = _CODE if self._in_code else _BOLD if self._in_bold or heading else ""
                parts.append(f"{style}{part}{_RESET}" if style else part)
        return "".join(parts)
