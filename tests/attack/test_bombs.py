"""Chat templates and tokenizers that were made to hurt: each is the error of one request, or a sentence at start."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import pytest

from tests.attack.bombs import TEMPLATES, TOKENIZERS, UNLOADABLE, UNUSABLE, loaded
from tests.attack.checkpoints import derived, with_template
from tests.attack.clients import check_free, resident_bytes
from tests.support.server import START_S, Server, check_error, wait_for

assert len(TEMPLATES) >= 75
SOME = list(TEMPLATES)[::13]


class Beside:
    """Somebody else meanwhile: seconds of each look at /health, and of each chat."""

    def __init__(self, server: Server) -> None:
        self.health: list[float] = []
        self.server = server
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._left.wait(0.02):
            started = time.monotonic()
            assert self.server.http.get("/health").status_code == 200
            self.health.append(time.monotonic() - started)

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()


def set_off(server: Server, names: Iterable[str]) -> None:
    """One after the other. All are refused in a sentence, or turn out to be harmless; then the next one is served."""
    expected = server.chat("Hello", temperature=0, max_tokens=8).json()["choices"]
    before = resident_bytes(server.process.pid)
    with Beside(server) as beside:
        for name in names:
            answer = server.chat(name, max_tokens=1)
            assert answer.status_code in (200, 400), (name, answer.text)
            if answer.status_code == 400:
                check_error(answer, 400, "messages")
            again = server.chat("Hello", temperature=0, max_tokens=8)
            assert again.status_code == 200 and again.json()["choices"] == expected, (name, again.text)
    assert resident_bytes(server.process.pid) - before < 64 * 2**20
    assert sorted(beside.health)[len(beside.health) // 2] < 0.2
    check_free(server)
    assert "Traceback" not in server.log()


def check_templates(folder: Path, names: Iterable[str]) -> None:
    model = derived(folder / "model", tokenizer_config=with_template(loaded(TEMPLATES)))
    with Server("--model-path", str(model)) as server:
        set_off(server, names)


def test_some_templates(tmp_path: Path) -> None:
    check_templates(tmp_path, SOME)


@pytest.mark.attack
@pytest.mark.timeout(900)
def test_every_template(tmp_path: Path) -> None:
    check_templates(tmp_path, TEMPLATES)


def names(table: Iterable[str], first: int) -> list[object]:
    """The first ones belong to every run."""
    return [pytest.param(name, marks=() if i < first else pytest.mark.attack) for i, name in enumerate(table)]


@pytest.mark.parametrize("name", names(TOKENIZERS, 1))
def test_tokenizers(tmp_path: Path, name: str) -> None:
    change, text = TOKENIZERS[name]
    model = derived(tmp_path / "model", tokenizer=change)
    with Server("--model-path", str(model)) as server, Beside(server):
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 1}),
            ("/v1/completions", {"prompt": text, "max_tokens": 1}),
        ):
            answer = server.post(path, body)
            assert answer.status_code in (200, 400), answer.text
            assert server.chat("Hello", max_tokens=2).status_code == 200
        check_free(server)
        assert "Traceback" not in server.log()


def check_start(model: Path) -> None:
    """It serves, or it says in a sentence why not."""
    server = Server("--model-path", str(model), wait=False)
    try:
        wait_for(lambda: server.process.poll() is not None or "ready_after" in server.log(), START_S)
        assert "Traceback" not in server.log()
        if server.process.poll() is None:
            server.wait_ready()
            assert server.chat("Hello", max_tokens=2).status_code in (200, 400)
            assert server.http.get("/health").status_code == 200
        else:
            assert server.process.returncode == 1, server.log()
            sentences = [line for line in server.log().splitlines() if line.startswith("gptq-api serve: ")]
            assert len(sentences) == 1 and len(sentences[0]) < 500, server.log()
    finally:
        server.close()


@pytest.mark.parametrize("name", names(UNUSABLE, 1))
def test_templates_that_nobody_can_use(tmp_path: Path, name: str) -> None:
    check_start(derived(tmp_path / "model", tokenizer_config=with_template(UNUSABLE[name])))


@pytest.mark.parametrize("name", names(UNLOADABLE, 1))
def test_tokenizers_that_nobody_can_load(tmp_path: Path, name: str) -> None:
    check_start(derived(tmp_path / "model", tokenizer=UNLOADABLE[name]))
