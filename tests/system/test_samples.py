"""What n choices of one request cost the API process: one message to the engine, one reader, no task of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Server, chat_body, stream_chunks
from tests.system.test_life import running

COUNTING = """
import sys
if "serve" in sys.orig_argv:
    import asyncio, json, os
    from gptq_api.engine import client, wire
    def note(**fields):
        with open(os.environ["NOTES"], "a") as notes:
            notes.write(json.dumps(fields) + "\\n")
    encode, deliver = wire.encode, client.EngineClient._deliver
    def counting(message):
        note(sent=type(message).__name__)
        return encode(message)
    def counted(self, step):
        note(tasks=len(asyncio.all_tasks()))
        return deliver(self, step)
    wire.encode, client.EngineClient._deliver = counting, counted
"""
pytestmark = pytest.mark.usefixtures("slow_engine")
ENDLESS: dict[str, Any] = {"ignore_eos": True, "temperature": 0}


class Notes:
    """What the server's API process has sent to its engine, and how many tasks it had at every step."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def take(self) -> tuple[list[str], list[int]]:
        """(names of messages sent, numbers of tasks) since the last call."""
        notes = [json.loads(line) for line in self._path.read_text().splitlines()]
        self._path.write_text("")
        return [note["sent"] for note in notes if "sent" in note], [note["tasks"] for note in notes if "tasks" in note]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Notes]]:
    folder = tmp_path_factory.mktemp("counting")
    (folder / "sitecustomize.py").write_text(COUNTING)
    (folder / "notes").touch()
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    with Server("--max-queued-requests", "16", env={"PYTHONPATH": path, "NOTES": str(folder / "notes")}) as server:
        yield server, Notes(folder / "notes")


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_goes_to_the_engine_once(counted: tuple[Server, Notes], stream: bool) -> None:
    server, notes = counted
    server.wait_idle()
    notes.take()
    for body, num_prompts in (
        ({"prompt": "Once", "n": 8}, 1),
        ({"prompt": ["Once", "Twice"], "n": 3}, 2),
        ({"prompt": "Once", "best_of": 4}, 1),
    ):
        if stream and "best_of" in body:
            continue
        answer = server.post("/v1/completions", {**body, "max_tokens": 4, "stream": stream, **ENDLESS})
        assert answer.status_code == 200
        assert notes.take()[0] == ["Add"] * num_prompts, "and nothing has to be aborted"


def test_sixteen_choices_need_no_more_tasks_than_one(counted: tuple[Server, Notes]) -> None:
    server, notes = counted
    most = {}
    for n in (1, 16):
        server.wait_idle()
        notes.take()
        found = stream_chunks(server, chat_body("Tell me a story.", n=n, max_tokens=20, **ENDLESS))
        assert {choice["index"] for chunk in found for choice in chunk["choices"]} == set(range(n))
        most[n] = max(notes.take()[1])
    assert most[16] <= most[1] + 1


def test_what_is_refused_at_the_limit_leaves_nothing_behind(counted: tuple[Server, Notes]) -> None:
    """A request of more samples than there are places left: the engine never hears of it."""
    server, notes = counted
    server.wait_idle()
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(n=10, stream=True, **ENDLESS)):
        notes.take()
        assert server.chat(n=7).status_code == 429
        assert server.post("/v1/completions", {"prompt": ["a", "b"], "n": 4}).status_code == 429
        assert notes.take()[0] == []
        assert running(server) == 10
        assert server.chat(n=6, max_tokens=1).status_code == 200
    server.wait_idle()


def test_a_choice_that_meets_its_stop_string_gives_its_place_back(counted: tuple[Server, Notes]) -> None:
    """One is aborted while the others go on, and the rest when the client leaves."""
    server, notes = counted
    server.wait_idle()
    fields = {"n": 3, "seed": 6, "temperature": 2, "ignore_eos": True}
    whole = server.chat("Tell me a story.", max_tokens=40, **fields).json()["choices"]
    texts = [choice["message"]["content"] for choice in whole]
    stop = next(
        text[i : i + 12]
        for text in texts
        for i in range(20)
        if sum(text[i : i + 12] in other for other in texts) == 1 and len(text) > i + 12
    )
    notes.take()
    with server.http.stream(
        "POST", "/v1/chat/completions", json=chat_body("Tell me a story.", stop=stop, stream=True, **fields)
    ) as response:
        lines = response.iter_lines()  # kept: its end is that of the connection
        assert any('"finish_reason":"stop"' in line for line in lines)
        assert running(server) == 2
        assert notes.take()[0] == ["Add", "Abort"]
    server.wait_idle()
    assert notes.take()[0] == ["Abort"]
