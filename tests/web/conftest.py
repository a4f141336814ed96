"""One Chromium for all tests of this folder, and tabs that may not go wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from tests.support.browser import CHROMIUM, NO_CHROMIUM, Browser, Tab
from tests.support.server import Server

Open = Callable[..., "Chat"]
FIELDS = {"temperature", "top_p", "top_k", "max_tokens", "seed", "system", "more", "stop", "alternatives"}


class Chat:
    """The page in a tab, and what a person does there."""

    def __init__(self, tab: Tab, server: Server) -> None:
        self.tab, self.server = tab, server

    def ready(self) -> Chat:
        self.tab.wait("document.querySelector('#dot').classList.contains('ok')")
        return self

    def set(self, **settings: object) -> None:
        self.tab.js("document.querySelector('#panel').hidden && document.querySelector('#settings').click()")
        for name, value in settings.items():
            assert name in FIELDS
            self.tab.fill(f"#set-{name}", value if isinstance(value, str) else json.dumps(value))
        self.tab.click("#close-panel")

    def send(self, text: str) -> None:
        self.tab.fill("#input", text)
        self.tab.press("Enter")

    def done(self) -> None:
        self.tab.wait("!document.querySelector('.live') && !document.querySelector('#send').hidden")

    def ask(self, text: str) -> str:
        """Send a message and wait for its answer."""
        self.send(text)
        self.tab.wait("document.querySelector('.message')")
        self.done()
        return self.texts()[-1]

    def press(self, label: str) -> None:
        """A button of the last message that has it, and what comes of it."""
        self.tab.click(".tools button", label)
        self.done()

    def texts(self) -> list[str]:
        """What is shown of each message."""
        texts: list[str] = self.tab.js(
            "[...document.querySelectorAll('.message > .body')].map((node) => node.innerText.trim())"
        )
        return texts

    def tokens(self) -> list[str]:
        """Of all answers, where they are shown."""
        tokens: list[str] = self.tab.js("[...document.querySelectorAll('.token')].map((node) => node.textContent)")
        return tokens

    def code(self) -> str:
        """What the dialog with the request shows."""
        code: str = self.tab.js("document.querySelector('#code').textContent")
        return code

    def facts(self) -> str:
        """The line under the last answer."""
        text: str = self.tab.js("[...document.querySelectorAll('.facts')].pop().textContent")
        return text

    def counts(self) -> list[str]:
        """Which version of how many, of messages that have several."""
        counts: list[str] = self.tab.js("[...document.querySelectorAll('.count')].map((node) => node.textContent)")
        return counts

    def said(self) -> str:
        """The line above the messages, "" where there is none."""
        text: str = self.tab.js(
            "document.querySelector('#banner').hidden ? '' : document.querySelector('#banner').innerText"
        )
        return text


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip(NO_CHROMIUM)
    with Browser() as running:
        yield running


@pytest.fixture
def open_chat(browser: Browser) -> Iterator[Open]:
    """Opens the page of a server, with storage of its own. At the end nothing went wrong in it, no dialog opened, and
    it asked nobody else for anything. `expects`: what may stand in the browser's console."""
    opened: list[tuple[Chat, tuple[str, ...]]] = []

    def open_chat(server: Server, *, path: str = "/", expects: tuple[str, ...] = (), **media: str) -> Chat:
        chat = Chat(browser.open(f"http://127.0.0.1:{server.port}{path}", **media), server)
        opened.append((chat, expects))
        return chat

    yield open_chat
    for chat, expects in opened:
        tab = chat.tab
        wrong = [error for error in tab.errors if not any(known in error for known in expects)]
        assert not wrong and not tab.dialogs
        own = (f"http://127.0.0.1:{chat.server.port}/", "data:image/svg+xml,", "blob:")
        assert all(address.startswith(own) for address in tab.asked), tab.asked
        tab.call("Page.close")


@pytest.fixture
def chat(open_chat: Open, server: Server) -> Chat:
    """The page of the demo model, ready; greedy, so that answers are known."""
    found = open_chat(server).ready()
    found.set(temperature=0)
    return found
