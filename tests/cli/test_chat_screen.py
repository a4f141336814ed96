"""Text as it comes from a model, on a terminal of some width: wrapped at blanks, coloured, and nothing left out."""

from __future__ import annotations

import random
import re

import pytest
from prompt_toolkit.utils import get_cwidth

from gptq_api.cli.chat_screen import Screen, plain

TEXT = """# Title here
Some **bold words** and `code here` that are long enough to be wrapped at the edge of a narrow terminal.

```python
def f(x):    return x * 2 + 1 # a line of code that is longer than the terminal is wide
```
After it, 中文字 and é👋 and averyveryveryverylongwordthatfitsnowhere, the end."""


def shown(text: str, width: int, has_colour: bool, seed: int = 0) -> str:
    """Fed in random pieces."""
    rng, screen, out = random.Random(seed), Screen(width, has_colour), ""
    while text:
        cut = rng.randint(1, 9)
        out, text = out + screen.feed(text[:cut]), text[cut:]
    return out + screen.end()


def without_colour(text: str) -> str:
    return re.sub(r"\x1b\[[0-9]*m", "", text)


@pytest.mark.parametrize("width", [20, 33, 80])
def test_words_are_wrapped_and_none_is_lost(width: int) -> None:
    for seed in range(20):
        out = shown(TEXT, width, False, seed)
        assert re.sub(r"\s", "", out) == re.sub(r"\s", "", TEXT)
        prose = out.split("```")[0] + out.split("```")[2]
        for line in prose.splitlines():
            assert get_cwidth(line.rstrip()) <= width or " " not in line.strip(), line
    assert "x * 2 + 1 # a line of code that is longer" in shown(TEXT, 20, False), "code is not wrapped"


def test_colour_changes_no_character_and_ends_with_the_line() -> None:
    out = shown(TEXT, 40, True)
    assert without_colour(out) == shown(TEXT, 40, False)
    assert "\x1b[1mbold\x1b[0m" in out and "\x1b[36mcode\x1b[0m" in out and "\x1b[1mTitle\x1b[0m" in out
    assert "\x1b[36mreturn\x1b[0m" in out and out.endswith("\x1b[0m")
    for line in out.splitlines():
        assert "\x1b[1m" not in line or line.endswith("\x1b[0m") or "\x1b[0m" in line.rpartition("\x1b[1m")[2]


def test_what_terminals_obey_does_not_get_through() -> None:
    hostile = "a\x1b[31mred\x07\x9b2J b\r\x00c"
    assert plain(hostile) == "a[31mred2J bc"
    assert without_colour(shown(hostile, 80, False)) == plain(hostile)
