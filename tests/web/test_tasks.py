"""What a person does on the page, in a real browser against a real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.loading import LoadingServer
from tests.support.server import Server, wait_for
from tests.web.conftest import Chat, Open

LONG = {"ignore_eos": True, "max_tokens": 900}


def test_an_answer_streams_and_says_what_it_took(chat: Chat) -> None:
    chat.tab.js(
        "window.seen = new Set(); new MutationObserver(() => { const body = document.querySelector('.live .body');"
        "if (body) window.seen.add(body.textContent.length); })"
        ".observe(document.querySelector('#messages'), {subtree: true, childList: true, characterData: true})"
    )
    chat.set(more={"ignore_eos": True, "max_tokens": 200})
    answer = chat.ask("What is GPTQ?")
    assert answer.startswith("GPTQ is a method that quantises the weights")
    assert len(chat.tab.js("[...window.seen]")) >= 3, "the text grew"
    assert "200 tokens · " in chat.facts() and "tokens/s · first after" in chat.facts() and "seed " in chat.facts()
    assert chat.tab.js("document.querySelector('#room-text').textContent") == "208 of 1,024 tokens"
    assert chat.tab.js("document.querySelector('#gauge').value") == 208
    chat.set(more={})
    chat.ask("What is GPTQ?")
    assert "prompt tokens cached" in chat.facts()
    assert chat.tab.js("document.title") == "What is GPTQ? – gptq-api"


@pytest.mark.usefixtures("slow_engine")
def test_stop_keeps_what_came_and_frees_the_engine(open_chat: Open) -> None:
    with Server() as slow:
        chat = open_chat(slow).ready()
        for by_key in (False, True):
            chat.set(temperature=0, more=LONG)
            chat.send("Tell me a story.")
            chat.tab.wait("(document.querySelector('.live .body') || {textContent: ''}).textContent.length > 5")
            chat.tab.press("Escape") if by_key else chat.tab.click("#stop")
            chat.done()
            assert "stopped" in chat.facts() and len(chat.texts()[-1]) > 5
            slow.wait_idle()


def test_an_edit_keeps_the_old_branch_and_arrows_switch(chat: Chat) -> None:
    first = chat.ask("What is GPTQ?")
    second = chat.ask("Count from 1 to 10.")
    assert chat.counts() == []
    chat.tab.js("document.querySelectorAll('.message.user')[0].querySelectorAll('.tools button')[1].click()")
    assert chat.tab.js("document.querySelector('.edit textarea').value") == "What is GPTQ?"
    chat.tab.fill(".edit textarea", "Tell me a story about a fox.")
    chat.tab.press("Enter")
    chat.done()
    assert len(chat.texts()) == 2 and chat.counts() == ["2/2"], "what followed belongs to the other branch"
    assert chat.texts()[0] == "Tell me a story about a fox." and chat.texts()[1] != first
    chat.tab.click("[aria-label='Previous version']")
    assert chat.texts() == ["What is GPTQ?", first, "Count from 1 to 10.", second] and chat.counts() == ["1/2"]
    assert chat.tab.js("document.activeElement.classList.contains('turn')"), "the keyboard stays where it was"
    chat.tab.press("Enter")
    assert chat.counts() == ["2/2"], "that one goes on, since there is no earlier one"
    chat.tab.js("document.querySelector('#input').focus()")
    chat.tab.press("ArrowUp")
    assert chat.tab.js("document.activeElement.value") == "Tell me a story about a fox."
    chat.tab.press("Escape")
    assert chat.tab.js("document.querySelector('.edit')") is None and len(chat.texts()) == 2


def seed_in(facts: str) -> int:
    return int(facts.split("seed ", 1)[1].split()[0])


def test_regenerate_and_the_same_seed(chat: Chat) -> None:
    chat.set(temperature=2, max_tokens=20)
    chat.ask("Tell me a story.")
    first = seed_in(chat.facts())
    chat.press("Regenerate")
    assert chat.counts() == ["2/2"]
    assert seed_in(chat.facts()) != first and "same seed" not in chat.facts()  # two seeds may give the same text
    second = chat.texts()[-1]
    chat.press("Same seed")
    assert chat.counts() == ["3/3"] and chat.texts()[-1] == second
    assert chat.facts().endswith("✓ same seed, same text")
    chat.tab.click("[aria-label='Previous version']")
    assert chat.facts().endswith("✓ same seed, same text"), "both say so"
    chat.tab.click("[aria-label='Previous version']")
    assert "same seed" not in chat.facts()


def test_an_answer_of_the_assistant_can_be_continued_and_edited(chat: Chat) -> None:
    whole = chat.ask("What is GPTQ?")
    chat.set(max_tokens=6)
    begun = chat.ask("What is GPTQ?")
    assert "cut at its longest" in chat.facts() and whole.startswith(begun)
    chat.set(max_tokens="")
    chat.press("Continue")
    assert chat.texts()[-1] == whole and chat.counts() == []
    chat.tab.click(".tools button", "Edit")
    chat.tab.fill(".edit textarea", "GPTQ is")
    chat.tab.click(".edit button", "Save")
    assert chat.texts()[-1] == "GPTQ is" and chat.counts() == ["2/2"]
    chat.press("Continue")
    assert chat.texts()[-1] == whole


def test_settings_are_what_is_sent(chat: Chat) -> None:
    chat.set(system="You are terse.", max_tokens=3, top_p=0.9, top_k=40, seed=11, stop="zebra", alternatives=2)
    chat.set(more={"min_tokens": 2, "frobnicate": 1})
    chat.ask("Hello")
    body = chat.tab.posted[-1]
    assert body["messages"] == [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Hello"}]
    named = {"temperature": 0, "max_tokens": 3, "top_p": 0.9, "top_k": 40, "seed": 11, "stop": ["zebra"]}
    assert named.items() <= body.items() and body["top_logprobs"] == body["min_tokens"] == 2
    assert "3 tokens" in chat.facts() and "seed 11" in chat.facts()
    assert "The server does not know: frobnicate" in chat.tab.js("document.querySelector('#messages').innerText")
    chat.set(more="{not json", seed="")
    chat.send("Hello")
    chat.tab.wait("document.querySelector('.message .error')")
    assert "not a JSON object" in chat.tab.js("document.querySelector('.message .error').textContent")
    chat.set(more={"temperature": 9})
    chat.press("Regenerate")
    assert "temperature" in chat.tab.js("document.querySelector('.message .error').textContent"), (
        "the server's own sentence"
    )


def test_conversations_outlast_a_reload(chat: Chat) -> None:
    answer = chat.ask("What is GPTQ?")
    chat.press("Regenerate")
    chat.tab.click("#new")
    chat.ask("Count from 1 to 10.")
    chat.set(more=LONG)
    chat.send("Tell me a story.")
    chat.tab.wait("document.querySelector('.live .body').textContent.length > 5")
    chat.tab.fill("#input", "a draft")
    chat.tab.reload()
    chat.ready()
    assert (
        chat.texts()[0] == "Count from 1 to 10." and chat.tab.js("document.querySelector('#input').value") == "a draft"
    )
    chat.tab.click("#list .open-it", "What is GPTQ?")
    assert chat.texts() == ["What is GPTQ?", answer] and chat.counts() == ["2/2"]
    chat.tab.click("#list [aria-label='Delete What is GPTQ?']")
    assert chat.tab.js("document.querySelectorAll('#list li').length") == 1
    chat.tab.click("#toast-do")
    assert chat.texts() == ["What is GPTQ?", answer]


def test_export_and_import(chat: Chat, open_chat: Open, tmp_path: Path) -> None:
    chat.ask("What is GPTQ?")
    chat.press("Regenerate")
    chat.ask("Count from 1 to 10.")
    chat.tab.downloads(tmp_path)
    chat.tab.click("#export")
    (file,) = wait_for(lambda: list(tmp_path.glob("conversations-*.json")), 10)
    told = json.loads(file.read_text())
    assert told["format"] == "gptq-api conversations" and len(told["conversations"]) == 1
    other = open_chat(chat.server).ready()
    other.tab.choose_file("#file", file)
    other.tab.wait("document.querySelector('.message')")
    assert other.texts() == chat.texts() and other.counts() == ["2/2"]
    other.tab.reload()
    other.ready()
    assert other.texts() == chat.texts()
    other.tab.click("#heat")
    assert other.tab.js("document.querySelectorAll('.token').length") > 20, "with the tokens"
    for bad, why in (
        ("{", "it is not JSON"),
        ("[]", "it was not exported by this page"),
        (json.dumps({**told, "version": 9}), "it is of version 9"),
        (json.dumps({**told, "conversations": [{"nodes": 5}]}), "has no messages"),
    ):
        wrong = tmp_path / "wrong.json"
        wrong.write_text(bad)
        other.tab.choose_file("#file", wrong)
        other.tab.wait(f"document.querySelector('#toast-text').textContent.includes({json.dumps(why)})")
    assert other.tab.js("document.querySelectorAll('#list li').length") == 1


def test_a_token_says_its_probability_and_another_goes_on_from_there(chat: Chat) -> None:
    answer = chat.ask("What is GPTQ?")
    chat.tab.click("#heat")
    tokens = chat.tokens()
    assert "".join(tokens) == answer and len(tokens) > 20
    chat.tab.js("document.querySelectorAll('.token')[2].focus()")
    chat.tab.press("ArrowRight")
    chat.tab.press("ArrowLeft")
    chat.tab.press("ArrowRight")
    chat.tab.press("Enter")
    rows = chat.tab.js("[...document.querySelectorAll('#choices-list .text')].map((node) => node.textContent)")
    assert rows[0] == tokens[3].replace(" ", "␣") and len(rows) == 5
    assert chat.tab.js("document.querySelector('#choices-list .now').disabled")
    chat.tab.click("#choices-list button:not(:disabled) .text", rows[1])
    chat.tab.wait("document.querySelector('.count')")
    chat.done()
    taken = "".join(tokens[:3]) + rows[1].replace("␣", " ")
    assert chat.texts()[-1].startswith(taken) and len(chat.texts()[-1]) > len(taken) and chat.counts() == ["2/2"]
    assert chat.tab.posted[-1]["messages"][-1] == {"role": "assistant", "content": taken}
    assert chat.tab.posted[-1]["continue_final_message"] is True
    again = chat.tokens()
    assert again[:3] == tokens[:3] and "".join(again) == chat.texts()[-1]
    assert chat.tab.js("document.querySelectorAll('.token.taken').length") == 1
    forked = chat.texts()[-1]
    chat.press("Same seed")
    assert chat.texts()[-1] == forked and chat.facts().endswith("✓ same seed, same text")


def test_an_answer_can_end_where_the_end_was_likely(chat: Chat) -> None:
    chat.set(more={"structured_outputs": {"choice": ["Yes. And more of it."]}, "top_logprobs": 20}, alternatives=20)
    assert chat.ask("Is this so?") == "Yes. And more of it."
    chat.tab.click("#heat")
    ends = chat.tab.js(
        "(() => { for (const [at, token] of [...document.querySelectorAll('.token')].entries()) { token.click();"
        "const rows = [...document.querySelectorAll('#choices-list .text')];"
        "const end = rows.find((node) => node.textContent === 'end here');"
        "if (at && end) { end.click(); return at; } document.querySelector('#choices').close(); } return 0; })()"
    )
    assert ends
    assert "Yes. And more of it.".startswith(chat.texts()[-1]) and chat.counts() == ["2/2"]
    assert len(chat.texts()[-1]) < len("Yes. And more of it.")


def test_a_key_is_asked_for_and_wrong_ones_are_told(open_chat: Open, strict_server: Server) -> None:
    chat = open_chat(strict_server, expects=("401",))
    chat.tab.wait("document.querySelector('#key-box').open")
    assert chat.tab.js("document.activeElement.id") == "key" and "asks for an API key" in chat.said()
    for wrong, why in (("wrong-key", "Incorrect API key provided"), ("a key", "ASCII")):
        chat.tab.fill("#key", wrong)
        chat.tab.press("Enter")
        chat.tab.wait(f"document.querySelector('#key-error').textContent.includes({json.dumps(why)})")
        assert chat.tab.js("document.querySelector('#key-box').open")
    chat.tab.fill("#key", "first-key")
    chat.tab.press("Enter")
    chat.ready()
    chat.set(max_tokens=8)
    assert chat.ask("Hello") and chat.said() == ""
    assert chat.tab.js("Object.values(sessionStorage).includes('first-key')")
    assert "first-key" not in chat.tab.js("JSON.stringify(localStorage)")
    chat.tab.click("#request")
    assert "first-key" not in chat.code()
    assert "$GPTQ_API_KEY" in chat.code()
    chat.tab.press("Escape")
    chat.tab.reload()
    chat.ready()
    assert len(chat.texts()) == 2
    chat.tab.click("#settings")
    chat.tab.click("#forget")
    chat.tab.wait("document.querySelector('#key-box').open")
    assert not chat.tab.js("Object.values(sessionStorage).includes('first-key')")


@pytest.mark.usefixtures("slow_engine")
def test_an_engine_that_dies_and_a_server_that_comes_back(open_chat: Open) -> None:
    noise = ("503", "ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE")
    with Server("--restart-engine", "5") as server:
        chat = open_chat(server, expects=noise).ready()
        chat.set(temperature=0, more=LONG)
        chat.send("Tell me a story.")
        chat.tab.wait("(document.querySelector('.live .body') || {textContent: ''}).textContent.length > 5")
        os.kill(server.engine_pid, signal.SIGKILL)
        chat.tab.wait("document.querySelector('.message .error')")
        chat.done()
        assert len(chat.texts()[-1]) > 5, "what had come stays"
        chat.tab.wait("document.querySelector('#banner').innerText.includes('being loaded')")
        assert chat.tab.js("document.querySelector('#send').disabled")
        chat.ready()
        assert chat.said() == ""
        chat.set(more={"max_tokens": 30})
        chat.press("Continue")
        assert not chat.tab.js("document.querySelectorAll('.message .error').length")
        port = server.port
    chat.tab.wait("document.querySelector('#banner').innerText.includes('does not answer')")
    with Server(port=port):
        chat.ready()
        assert chat.said() == "" and len(chat.ask("Count from 1 to 10.")) > 5


def test_the_request_as_curl_and_as_python_does_what_the_page_did(chat: Chat) -> None:
    chat.set(max_tokens=12, top_k=5, seed=3, system='It\'s "quoted" $HOME `date` \\n\nJSON\n')
    answer = chat.ask("What is GPTQ? It's 'quoted', $HOME.")
    chat.tab.click(".tools button", "Request")
    command = chat.code()
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    lines = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("data: {")]
    assert "".join(line["choices"][0]["delta"].get("content", "") for line in lines) == answer
    chat.tab.click("#as-python")
    done = subprocess.run([sys.executable, "-c", chat.code()], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == answer + "\n"


def test_what_the_checkpoint_is_and_what_runs(chat: Chat) -> None:
    chat.ask("Hello")
    chat.tab.click("#model")
    chat.tab.wait("document.querySelector('#now').innerText.includes('KV cache in use')")
    shown = chat.tab.js("document.querySelector('#passport').innerText")
    assert "demo" in shown and "1,024 tokens" in shown and "GPTQ, 4 bits, groups of 32, act-order" in shown
    assert "LLaMA, 8 layers of 384" in shown and "cpu" in shown
    chat.tab.wait("!/Generated\\s+0 tokens/.test(document.querySelector('#now').innerText)")
    chat.tab.press("Escape")
    assert chat.tab.js("document.activeElement.id") == "model", "the keyboard is back where it came from"


def test_nothing_is_asked_while_nobody_looks(chat: Chat) -> None:
    chat.tab.js("Object.defineProperty(document, 'visibilityState', {value: 'hidden', configurable: true})")
    chat.tab.js("document.dispatchEvent(new Event('visibilitychange'))")
    chat.tab.js("new Promise((resolve) => setTimeout(resolve, 300))")
    before = len(chat.tab.asked)
    chat.tab.js("new Promise((resolve) => setTimeout(resolve, 4000))")
    assert len(chat.tab.asked) == before
    chat.tab.js("delete document.visibilityState; document.dispatchEvent(new Event('visibilitychange'))")
    wait_for(lambda: len(chat.tab.asked) > before, 10)


def test_by_keyboard_alone(chat: Chat) -> None:
    chat.tab.reload()
    chat.ready()
    assert chat.tab.js("document.activeElement.id") == "input"
    chat.tab.type("What is GPTQ?")
    chat.tab.press("Enter", shift=True)
    chat.tab.type("In short.")
    chat.tab.press("Enter")
    chat.done()
    assert chat.texts()[0] == "What is GPTQ?\nIn short."
    reached = []
    for _ in range(40):
        chat.tab.press("Tab")
        reached.append(chat.tab.js("document.activeElement.textContent.trim() || document.activeElement.id"))
    assert {"New chat", "Export", "Import", "Settings", "Probabilities", "Regenerate", "Continue", "Edit"} <= {*reached}


def test_it_opens_while_the_model_loads_and_says_so(open_chat: Open, tmp_path: Path) -> None:
    with LoadingServer(tmp_path) as loading:
        chat = open_chat(loading, expects=("503",))
        chat.tab.wait("document.querySelector('#banner').innerText.includes('being loaded')")
        assert chat.tab.js("document.querySelector('#send').disabled")
        assert "being loaded" in chat.tab.js("document.querySelector('#greeting').textContent")
        chat.tab.fill("#input", "Count from 1 to 10.")
        chat.tab.press("Enter")
        assert chat.tab.js("document.querySelector('#input').value") == "Count from 1 to 10.", "it is kept"
        loading.go()
        chat.ready()
        assert chat.said() == ""
        chat.set(temperature=0)
        chat.tab.click("#send")
        chat.tab.wait("document.querySelector('.message')")
        chat.done()
        assert "10" in chat.texts()[-1]
