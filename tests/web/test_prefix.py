"""The page behind a reverse proxy that serves it below a path, with and without a slash behind that."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.support.prefix_proxy import PrefixProxy
from tests.support.server import Server
from tests.web.conftest import Chat, Open

SEEN = "(document.querySelector('.live .body') || {textContent: ''}).textContent.length > 5"


@pytest.fixture
def proxy(server: Server) -> Iterator[PrefixProxy]:
    with PrefixProxy({"/llm": server.port}) as running:
        yield running


@pytest.fixture(params=["/llm/", "/llm"])
def chat(open_chat: Open, proxy: PrefixProxy, request: pytest.FixtureRequest) -> Iterator[Chat]:
    found = open_chat(proxy, path=request.param).ready()
    found.set(temperature=0)
    yield found
    asked = [urlsplit(address).path for address in found.tab.asked if address.startswith("http")]
    assert len(asked) > 3 and all(path == "/llm" or path.startswith("/llm/") for path in asked), asked
    assert proxy.strays == []


def test_it_chats_and_shows_what_it_is_and_who_is_beside(chat: Chat) -> None:
    assert chat.ask("Count from 1 to 5.").split()[-1].rstrip(".") == "5"
    assert "tokens" in chat.facts()
    chat.tab.wait("/idle|running/.test(document.querySelector('#batch').textContent)")
    chat.tab.click("#model")
    chat.tab.wait("document.querySelector('#now').innerText.includes('KV cache in use')")
    assert "GPTQ, 4 bits" in chat.tab.js("document.querySelector('#passport').innerText")


def test_the_request_as_code_asks_where_the_browser_asked(chat: Chat, proxy: PrefixProxy) -> None:
    chat.ask("What is GPTQ?")
    chat.tab.click(".tools button", "Request")
    address = f"http://127.0.0.1:{proxy.port}/llm/v1"
    assert f"{address}/chat/completions " in chat.code()
    chat.tab.click("#as-python")
    assert f'base_url="{address}"' in chat.code()
    done = subprocess.run([sys.executable, "-c", chat.code()], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == chat.texts()[-1]


def test_the_link_leads_to_the_docs_which_ask_below_it_too(chat: Chat) -> None:
    chat.tab.click("a", "API")
    chat.tab.wait("location.pathname === '/llm/docs' && document.querySelectorAll('#places > details').length > 10")
    chat.tab.js(
        "(() => { const box = [...document.querySelectorAll('#places > details')].find((one) => "
        "one.querySelector('summary code').textContent === '/v1/models'); box.open = true; "
        "const attempt = box.lastElementChild; attempt.open = true; attempt.querySelector('button').click(); })()"
    )
    chat.tab.wait("[...document.querySelectorAll('#places pre')].some((out) => out.textContent.startsWith('200'))")
    chat.tab.wait("document.querySelector('a[href=\"openapi.json\"]').href.endsWith('/llm/openapi.json')")


def test_conversations_are_those_of_the_path(chat: Chat, proxy: PrefixProxy) -> None:
    chat.ask("What is GPTQ?")
    for path in ("/llm", "/llm/"):
        chat.tab.go(f"http://127.0.0.1:{proxy.port}{path}")
        chat.ready()
        chat.tab.wait("document.querySelectorAll('#list li').length === 1")


def test_a_key_is_not_told_to_the_server_beside(open_chat: Open, strict_server: Server, server: Server) -> None:
    with PrefixProxy({"/theirs": strict_server.port, "/llm": server.port}) as proxy:
        chat = open_chat(proxy, path="/theirs/", expects=("401",))
        chat.tab.wait("document.querySelector('#key-box').open")
        chat.tab.fill("#key", "first-key")
        chat.tab.press("Enter")
        chat.ready()
        chat.tab.go(f"http://127.0.0.1:{proxy.port}/llm/")
        chat.ready()
        chat.ask("What is GPTQ?")
        chat.tab.click(".tools button", "Request")
        assert "authorization" not in chat.code()
        assert chat.tab.js("document.querySelectorAll('#list li').length") == 1
        chat.tab.go(f"http://127.0.0.1:{proxy.port}/theirs/")
        chat.ready()


def test_tokens_come_one_by_one(slow_engine: None, open_chat: Open) -> None:
    with Server() as server, PrefixProxy({"/llm": server.port}) as proxy:
        chat = open_chat(proxy, path="/llm/").ready()
        chat.send("Tell me a story.")
        chat.tab.wait(SEEN)
        chat.tab.click("#stop")
        chat.done()
        server.wait_idle(20)
