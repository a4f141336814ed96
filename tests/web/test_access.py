"""Everybody can use the page: axe-core finds nothing in it, in light, dark and on a phone, and nothing moves for those
who asked for that. axe-core is an npm package: `npm install axe-core` in a folder that AXE names, or in ~/axe."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.server import Server
from tests.web.conftest import Chat, Open

_FOLDER = Path(os.environ.get("AXE", "~/axe")).expanduser()
AXE = _FOLDER / "node_modules" / "axe-core" / "axe.min.js"
VIEWS = {
    "light": ({"prefers_color_scheme": "light"}, (1280, 800)),
    "dark": ({"prefers_color_scheme": "dark"}, (1280, 800)),
    "phone": ({"prefers_color_scheme": "light"}, (360, 740)),
    "dark phone": ({"prefers_color_scheme": "dark"}, (360, 740)),
}
RICH = """# Title

Text with **bold**, *emphasis*, `code` and [a link](https://example.com/x).

1. one
2. two
   - nested

> quoted

| a | b |
|---|---|
| 1 | 2 |

```python
def f(x):  # note
    return "text" + str(12)
```
"""


def check(chat: Chat, where: str) -> None:
    chat.tab.js(AXE.read_text() + "; 0")
    found = chat.tab.js(
        "axe.run(document, {resultTypes: ['violations']}).then((told) => told.violations.map((one) =>"
        "[one.id, one.help, one.nodes.slice(0, 4).map((node) => node.html.slice(0, 200) + ' ' + node.failureSummary)]))"
    )
    assert not found, (where, found)


@pytest.mark.skipif(not AXE.exists(), reason="no axe-core here: `npm install axe-core` in the folder that AXE names")
@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing(open_chat: Open, server: Server, view: str) -> None:
    media, size = VIEWS[view]
    chat = open_chat(server, **media)
    chat.tab.call("Page.setBypassCSP", enabled=True)
    chat.tab.size(*size)
    chat.tab.reload()
    chat.ready()
    check(chat, "empty")
    chat.set(temperature=2, max_tokens=40)
    chat.ask("Tell me a story.")
    chat.set(more={"structured_outputs": {"choice": [RICH]}}, max_tokens="")
    chat.ask("Show everything.")
    chat.press("Same seed")
    check(chat, "chat")
    chat.tab.click("#heat")
    check(chat, "probabilities")
    chat.tab.click(".token")
    check(chat, "alternatives")
    chat.tab.press("Escape")
    chat.tab.click("#settings")
    check(chat, "settings")
    chat.tab.press("Escape")
    chat.tab.click("#model")
    check(chat, "model")
    chat.tab.press("Escape")
    chat.tab.click(".tools button", "Request")
    check(chat, "request")
    chat.tab.press("Escape")
    if size[0] < 600:
        chat.tab.click("#menu")
        check(chat, "conversations")
        chat.tab.press("Escape")
    chat.set(more={"temperature": 9})
    chat.press("Regenerate")
    check(chat, "an error")
    chat.tab.js(
        "[...document.querySelectorAll('.message .tools button')].find((node) => node.textContent === 'Edit').click()"
    )
    check(chat, "editing")


def test_nothing_is_wider_than_the_screen(open_chat: Open, server: Server) -> None:
    chat = open_chat(server).ready()
    chat.set(
        more={"structured_outputs": {"choice": [RICH + "x" * 300 + "\n\n" + "| a " * 40 + "|\n" + "|-" * 40 + "|"]}}
    )
    chat.ask("https://example.com/" + "y" * 200)
    for width in (320, 360, 414, 768, 1024):
        chat.tab.size(width, 700)
        chat.tab.reload()
        chat.ready()
        chat.tab.wait("document.querySelectorAll('.message').length === 2")
        for in_tokens in (False, True):
            assert bool(chat.tokens()) is in_tokens
            assert chat.tab.js("document.scrollingElement.scrollWidth") <= width
            assert chat.tab.js(
                "document.querySelector('#log').scrollWidth <= document.querySelector('#log').clientWidth"
            )
            box = chat.tab.js(
                "((box) => [box.left, box.right])(document.querySelector('#send').getBoundingClientRect())"
            )
            assert box[0] >= 0 and box[1] <= width
            chat.tab.click("#heat")


def test_nothing_moves_for_those_who_asked_for_that(open_chat: Open, server: Server) -> None:
    for wish, animated in (("no-preference", True), ("reduce", False)):
        chat = open_chat(server, prefers_reduced_motion=wish).ready()
        chat.set(more={"ignore_eos": True, "max_tokens": 900})
        chat.send("Tell me a story.")
        chat.tab.wait("document.querySelector('.live .body')")
        name = "getComputedStyle(document.querySelector('.live > .body'), '::after').animationName"
        assert (chat.tab.js(name) != "none") is animated
        chat.tab.click("#stop")
        chat.done()
