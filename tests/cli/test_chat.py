"""`gptq-api chat` as people use it: a child process with piped lines, and one on a pseudo-terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.commands import Commands
from tests.support.text_tokenizers import byte_level

CHAT = [sys.executable, "-m", "gptq_api", "chat"]


class Peer(ThreadingHTTPServer):
    """Somebody else's OpenAI server, as small as it gets: it answers what the last message asks it to do."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.key: str | None = None
        """asked for, where there is one"""
        self.left = threading.Event()
        """a client went away in the middle of an answer"""
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Peer
    protocol_version = "HTTP/1.0"

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["authorization"])
        if self.server.key is not None and self.headers["authorization"] != f"Bearer {self.server.key}":
            self._json(401, {"error": {"message": "no key", "code": "invalid_api_key"}})
            return
        self._json(200, {"object": "list", "data": [{"id": "peer-model"}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        question = body["messages"][-1]["content"]
        if len(body["messages"]) > 5:
            error = {"message": "too long", "code": "context_length_exceeded", "type": "x", "param": "messages"}
            return self._json(400, {"error": error})
        if question == "refuse":
            return self._json(401, {"error": {"message": "no such key", "code": "invalid_api_key"}})
        if question == "busy":
            return self._json(429, {"error": {"message": "come back in 2 s", "code": "rate_limit_exceeded"}})
        if question == "long":
            return self._json(400, {"error": {"message": "at most 9 tokens", "code": "context_length_exceeded"}})
        if question == "html":
            return self._json(502, "<html>bad\x1b[31m gateway</html>")
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        if question == "break":
            self._event({"error": {"message": "out of luck", "type": "server_error", "param": None, "code": None}})
            return None
        if question == "odd":
            return self._event({"choices": ["x"]})
        if question == "gone":
            self._text("I was about")
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()  # a reset
            return None
        if question == "endless":
            try:
                while True:
                    self._text("more ")
                    time.sleep(0.02)
            except OSError:
                self.server.left.set()
            return None
        for piece in (f"You said {question}", " \x1b[31m\x07\u2028", "in é👋."):
            self._text(piece)
        if question == "cut":
            return None
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None})
        self._event({"choices": [], "usage": {"completion_tokens": 42}})
        self.wfile.write(b": a comment\r\ndata: [DONE]\r\n\r\n")
        return None

    def _text(self, text: str) -> None:
        self._event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})

    def _event(self, value: object) -> None:
        self.wfile.write(b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n")

    def _json(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def peer() -> Iterator[Peer]:
    server = Peer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


class Chat(Protocol):
    def __call__(self, lines: str, *args: str) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture
def chat(commands: Commands) -> Chat:
    """`lines` piped into the program."""
    return lambda lines, *args: commands.run("chat", *args, input=lines)


def test_piped_lines_are_a_conversation(peer: Peer) -> None:
    flags = ("--url", peer.url, "--temperature", "0", "--seed", "7", "--api-key", "k1")
    done = subprocess.run(
        [*CHAT, *flags], input="Hello\n\nagain\n", capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    # escape codes are kept from the terminal, the rest of the text is as it was sent
    assert done.stdout == "You said Hello [31m\u2028in é👋.\nYou said again [31m\u2028in é👋.\n"
    assert "42 tokens" in done.stderr
    assert "first after" in done.stderr
    assert "peer-model" in done.stderr
    assert peer.keys == ["Bearer k1"]
    first, second = peer.bodies
    assert first["messages"] == [{"role": "user", "content": "Hello"}]
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert first["model"] == "peer-model"
    assert (first["temperature"], first["seed"], first["stream"]) == (0, 7, True)
    assert "max_tokens" not in first


def test_commands(chat: Chat, peer: Peer) -> None:
    lines = "/help\n/system Be brief.\na\n/reset\nb\n/system\nc\n/nonsense\n/exit\nnever\n"
    done = chat(lines, "--url", peer.url, "--system", "first")
    assert done.returncode == 0
    contents = [[message["content"] for message in body["messages"]] for body in peer.bodies]
    assert contents[0] == ["Be brief.", "a"]
    assert contents[1] == ["Be brief.", "b"]
    assert contents[2][0] == "b"
    assert len(contents) == 3
    for words in ("/reset", "system prompt: Be brief.", "/nonsense is not a command"):
        assert words in done.stderr


def test_a_full_context_forgets_the_oldest_turns(chat: Chat, peer: Peer) -> None:
    done = chat("a\nb\nc\nd\n", "--url", peer.url)
    assert done.returncode == 0
    assert "oldest 2 messages are forgotten" in done.stderr
    assert [message["content"] for message in peer.bodies[-1]["messages"] if message["role"] == "user"] == [
        "b",
        "c",
        "d",
    ]


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("refuse", "401: no such key"),
        ("break", "out of luck"),
        ("cut", "closed the connection"),
    ],
)
def test_errors_of_the_server_are_one_sentence(chat: Chat, question: str, words: str, peer: Peer) -> None:
    done = chat(f"{question}\nnever asked\n", "--url", peer.url)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(peer.bodies) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1", "nonsense", "ftp://x/v1", "http://[", "http://127.0.0.1:1"])
def test_an_address_that_does_not_answer_is_one_sentence(chat: Chat, url: str) -> None:
    done = chat("hi\n", "--url", url)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert url in done.stderr


def test_a_missing_checkpoint_is_one_sentence(chat: Chat) -> None:
    done = chat("hi\n", "/no/such/folder")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "/no/such/folder" in done.stderr


def test_a_reader_that_goes_away_is_no_traceback(peer: Peer) -> None:
    process = subprocess.Popen(
        [*CHAT, "--url", peer.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(b"endless\n")
    process.stdin.flush()
    assert process.stdout.read(4) == b"more"
    process.stdout.close()
    assert process.wait(20) == 1
    assert b"Traceback" not in process.stderr.read()
    assert peer.left.wait(10)
    process.stdin.close()
    process.stderr.close()


def test_interrupt_ends_a_piped_chat_that_waits_for_input(peer: Peer) -> None:
    process = subprocess.Popen(
        [*CHAT, "--url", peer.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(b"Hello\n")
    process.stdin.flush()
    assert process.stdout.readline().startswith(b"You said")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert b"Traceback" not in process.stderr.read()
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()


class Terminal:
    """The program on a pseudo-terminal, typed at and read from."""

    def __init__(self, *args: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        env = os.environ | {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            [*CHAT, *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.screen = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, words: str, seconds: float = 30) -> None:
        """Reads on until `words` appear after what was waited for before."""
        deadline = time.monotonic() + seconds
        while words not in self.screen:
            assert time.monotonic() < deadline, f"{words!r} did not come; on the screen: {self.screen!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                data = os.read(self._master, 65536).decode(errors="replace")
                self.screen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data)
        self.screen = self.screen.partition(words)[2]

    def close(self) -> int:
        try:
            while os.read(self._master, 65536):
                pass
        except OSError:  # EIO: the other side is closed
            pass
        status = self.process.wait(20)
        os.close(self._master)
        return status


def test_on_a_terminal(peer: Peer) -> None:
    terminal = Terminal("--url", peer.url)
    terminal.wait_for(">")
    terminal.type("first\r")
    terminal.wait_for("You said first")
    terminal.wait_for("42 tokens")
    terminal.wait_for(">")
    terminal.type("\x1b[A")  # arrow up: the history
    terminal.wait_for("first")
    terminal.type(" edited\r")
    terminal.wait_for("You said first edited")
    terminal.wait_for(">")
    terminal.type("endless\r")
    terminal.wait_for("more more")
    terminal.type("\x03")  # ^C stops the answer
    terminal.wait_for("stopped")
    assert peer.left.wait(10)
    terminal.wait_for(">")
    terminal.type("still here\r")
    terminal.wait_for("You said still here")
    terminal.wait_for(">")
    assert peer.bodies[-1]["messages"][-2]["content"].startswith("more more")
    terminal.type("half a line\x03")  # ^C clears the line
    terminal.wait_for("\n")  # of the old prompt, which is drawn once more; the next one is waited for, not this
    terminal.wait_for(">")
    terminal.type("\x03")
    terminal.wait_for("again")
    terminal.wait_for(">")
    terminal.type("\x03")
    assert terminal.close() == 0


def test_on_a_terminal_the_conversation_outlives_its_errors(peer: Peer) -> None:
    terminal = Terminal("--url", peer.url)
    terminal.wait_for(">")
    for question, words in {
        "refuse": "the server answers 401: no such key",
        "busy": "the server answers 429: come back in 2 s",
        "long": "the server answers 400: at most 9 tokens",
        "html": "the server answers 502",
        "break": "the server stopped: out of luck",
        "odd": "the server sent an event that is none of a chat",
        "cut": "the server closed the connection in the middle of the answer",
        "gone": "gptq-api chat: the connection failed",
    }.items():
        terminal.type(f"{question}\r")
        terminal.wait_for(words)
        terminal.wait_for(">")
    terminal.type("still here\r")
    terminal.wait_for("You said still here")
    assert "Traceback" not in terminal.screen
    roles = [message["role"] for message in peer.bodies[-1]["messages"]]
    assert roles == ["user", "assistant"] * 2 + ["user"], "what was answered in part stays, what was refused does not"
    terminal.wait_for(">")
    terminal.type("\x04")
    assert terminal.close() == 0


def test_a_key_that_is_missing_is_told_with_its_flag(chat: Chat, peer: Peer) -> None:
    peer.key = "secret"
    done = chat("hi\n", "--url", peer.url)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "answers 401: no key; here it is --api-key" in done.stderr
    assert chat("hi\n", "--url", peer.url, "--api-key", "secret").returncode == 0


def test_without_standard_input_there_is_nothing_to_say(peer: Peer) -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *CHAT, "--url", peer.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "") and "Traceback" not in done.stderr


def test_control_d_leaves(peer: Peer) -> None:
    terminal = Terminal("--url", peer.url)
    terminal.wait_for(">")
    terminal.type("refuse\r")
    terminal.wait_for("no such key")  # an error of one answer does not end the conversation
    terminal.wait_for(">")
    terminal.type("\x04")
    assert terminal.close() == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: what it says is noise, but the same noise every time."""
    folder = byte_level(tmp_path_factory.mktemp("vicuna-tiny"))
    return write_checkpoint(folder, random_model(Recipe(vocab_size=512, max_position_embeddings=512)))


SMALL = ("--kv-cache-mib", "16", "--num-threads", "1", "--device", "cpu")


def test_in_process_until_the_engine_dies(chat: Chat, checkpoint: Path) -> None:
    """Two answers of one conversation; the same seed says the same again in another process, whose engine is killed."""
    flags = (str(checkpoint), *SMALL, "--max-tokens", "8", "--seed", "3")
    first = chat("Hello\nagain\n", *flags)
    assert first.returncode == 0, first.stderr
    process = subprocess.Popen(
        [*CHAT, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write("Hello\nagain\n")
    process.stdin.flush()
    told = ""
    while told.count("first after") < 2:
        line = process.stderr.readline()
        assert line, told
        told += line
    for said in (first.stderr, told):
        assert "4-bit GPTQ" in said
        assert "built-in vicuna_v1.1" in said
        assert said.count(" tokens, ") == 2
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = " ".join(task.read_text() for task in tasks).split()
    (engine,) = (pid for pid in children if b"engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(int(engine), signal.SIGKILL)
    output, errors = process.communicate("again\nnever\n", timeout=30)
    assert process.returncode == 1
    assert output == first.stdout
    assert errors.startswith("gptq-api chat: the engine process ")
    assert errors.count("\n") == 1
    assert "Traceback" not in errors + output


def test_what_was_drafted_stands_behind_an_answer(chat: Chat) -> None:
    """The same is asked twice. The rate is that of the tokens behind the first text, which may be several."""
    question = "What is a GPTQ checkpoint?\n"
    drafting, plain = (
        chat(question * 2, "--temperature", "0", "--num-threads", "1", "--speculate", mode) for mode in ("auto", "off")
    )
    assert drafting.stdout == plain.stdout
    assert re.search(r"first after [0-9.]+ s, [1-9][0-9]* of [1-9][0-9]* drafted tokens accepted\n", drafting.stderr)
    assert "drafted" not in plain.stderr


def test_in_process_forgets_the_oldest_turns_when_the_context_is_full(chat: Chat, checkpoint: Path) -> None:
    lines = ["word " * 20] * 4 + ["word " * 2000, "never"]
    done = chat("\n".join(lines), str(checkpoint), *SMALL, "--max-tokens", "40", "--seed", "3")
    assert "messages are forgotten" in done.stderr
    assert done.stderr.count("first after") == 4
    assert done.returncode == 1
    assert "the model's context holds 512" in done.stderr


def test_a_checkpoint_without_weights_is_one_sentence(chat: Chat, tmp_path: Path) -> None:
    done = chat("hi\n", str(byte_level(tmp_path)), *SMALL)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr


def test_one_question_and_what_is_piped_behind_it(chat: Chat, peer: Peer) -> None:
    done = chat("", "What is this", "--url", peer.url)
    assert (done.returncode, done.stdout) == (0, "You said What is this [31m\u2028in é👋.\n")
    assert "42 tokens" in done.stderr
    assert chat("print(1)\n", "Explain", "--url", peer.url).returncode == 0
    assert chat("", "--url", peer.url, "--question", "and this").returncode == 0
    asked = [body["messages"] for body in peer.bodies]
    assert asked == [
        [{"role": "user", "content": text}] for text in ("What is this", "Explain\n\nprint(1)", "and this")
    ]
    refused = chat("", "refuse", "--url", peer.url)
    assert refused.returncode == 1 and "no such key" in refused.stderr and refused.stdout == ""
    model = chat("", "/models/x", "--url", peer.url)
    assert model.returncode == 2 and "does nothing beside --url" in model.stderr


def test_one_question_to_the_demo(chat: Chat) -> None:
    done = chat("", "What is GPTQ?", "--temperature", "0", "--num-threads", "1", "--device", "cpu")
    assert done.returncode == 0 and "4 bits" in done.stdout, done.stderr


def test_another_answer_a_file_and_figures(chat: Chat, peer: Peer, tmp_path: Path) -> None:
    file, page = tmp_path / "chat.json", tmp_path / "chat.md"
    lines = [
        *("/regenerate", "/save", f"/save {file}", "/stats", "Hello", "/regenerate", "/stats"),
        *(f"/save {file}", f"/save {file}", f"/save {page}", "/save /no/such/folder/x"),
    ]
    done = chat("\n".join(lines), "--url", peer.url, "--seed", "7", "--system", "Be brief.")
    assert done.returncode == 0, done.stderr
    first, second = peer.bodies
    assert first["messages"] == second["messages"] and (first["seed"], second["seed"]) == (7, 8)
    for words in (
        "there is no answer yet that could be another one",
        "/save FILE: the file's name is missing",
        "no answers yet",
        "2 answers, 84 tokens",
        f"{file} is there already; name another file",
        "/no/such/folder/x cannot be written: No such file or directory",
    ):
        assert words in done.stderr, words
    saved = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert page.read_text().startswith("**system**\n\nBe brief.\n\n**user**\n\nHello\n\n**assistant**\n\nYou said")


def test_lines_are_kept_for_the_next_chat_and_tab_completes(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    terminal = Terminal("--url", peer.url)
    terminal.wait_for(">")
    terminal.type("remember me\r")
    terminal.wait_for("You said remember me")
    terminal.wait_for(">")
    terminal.type("/st\t")
    terminal.wait_for("/stats")
    terminal.type("\r")
    terminal.wait_for("1 answers, 42 tokens")
    terminal.wait_for(">")
    terminal.type("\x04")
    assert terminal.close() == 0
    kept = tmp_path / "gptq-api" / "chat_history"
    assert "+remember me" in kept.read_text() and kept.stat().st_mode & 0o777 == 0o600
    terminal = Terminal("--url", peer.url)
    terminal.wait_for(">")
    terminal.type("\x1b[A\x1b[A")
    terminal.wait_for("remember me")
    terminal.type(" again\r")
    terminal.wait_for("You said remember me again")
    terminal.wait_for(">")
    terminal.type("\x04")
    assert terminal.close() == 0
