"""Names on the hub, against a server of our own on the loopback that speaks what huggingface_hub asks for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gptq_api.hub import HubError, choose_files, is_hub_name, local_model
from tests.support.checkpoints import Recipe, random_model, write_checkpoint
from tests.support.commands import Commands
from tests.support.float_models import add_tokenizer, vocab_size
from tests.support.server import Server, wait_for

NAME = "someone/tiny-GPTQ"
NOBODY = "http://127.0.0.1:9"
"""where nobody listens: the network is down"""
BRANCH = "gptq-4bit-32g-actorder_True"


class Hub(ThreadingHTTPServer):
    """Revision -> folder. `cut_after`: bytes of a weights file after which the connection breaks, once. `stalled`: a
    file that never comes."""

    def __init__(self, revisions: dict[str, Path]) -> None:
        self.revisions: dict[str, Path] = {}
        self.shas: dict[str, str] = {}
        for revision, folder in revisions.items():
            self.add(revision, folder)
        self.cut_after: int | None = None
        self.stalled: str | None = None
        self.requests: list[tuple[str, str, str | None]] = []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def add(self, revision: str, folder: Path) -> None:
        self.revisions[revision] = folder
        self.shas[revision] = hashlib.sha1(revision.encode()).hexdigest()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def folder(self, revision: str) -> Path | None:
        names = {sha: name for name, sha in self.shas.items()}
        return self.revisions.get(names.get(revision, revision))

    @property
    def weight_ranges(self) -> list[str | None]:
        return [span for method, path, span in self.requests if path.endswith(".safetensors") and method == "GET"]

    @property
    def downloaded(self) -> set[str]:
        return {path.rsplit("/", 1)[-1] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if path.startswith(f"/api/models/{NAME}/refs"):
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in self.server.shas.items()]
            return self._json({"branches": branches, "tags": [], "converts": []})
        if path == f"/api/models/{NAME}":
            path += "/revision/main"
        for kind in ("revision", "tree"):
            start = f"/api/models/{NAME}/{kind}/"
            if path.startswith(start):
                folder = self.server.folder(path.removeprefix(start).split("/")[0])
                if folder is None:
                    return self._error(404, "RevisionNotFound")
                files = sorted(file for file in folder.iterdir())
                if kind == "tree":
                    return self._json(
                        [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)} for f in files]
                    )
                sha = self.server.shas.get(path.rsplit("/", 1)[-1], path.rsplit("/", 1)[-1])
                return self._json({"id": NAME, "sha": sha, "siblings": [{"rfilename": f.name} for f in files]})
        if path.startswith(f"/{NAME}/resolve/"):
            revision, name = path.removeprefix(f"/{NAME}/resolve/").split("/", 1)
            folder = self.server.folder(revision)
            if folder is not None and (folder / name).is_file():
                return self._file(folder / name, self.server.shas.get(revision, revision))
            return self._error(404, "EntryNotFound")
        return self._error(401, "RepoNotFound")

    def _file(self, file: Path, sha: str) -> None:
        data = file.read_bytes()
        start = 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{_etag(file)}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = data[start:]
        while self.server.stalled == file.name:
            time.sleep(0.02)
        if self.server.cut_after is not None and file.suffix == ".safetensors":
            body, self.server.cut_after = body[: self.server.cut_after], None
            self.close_connection = True
        with contextlib.suppress(ConnectionError):  # whoever asked was killed
            self.wfile.write(body)

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """main: one file, with things nobody needs beside it; the branch: shards with act-order."""
    root = tmp_path_factory.mktemp("hub")
    plain = random_model(Recipe(vocab_size=vocab_size()))
    main = add_tokenizer(write_checkpoint(root / "main", plain))
    for name in ("pytorch_model.bin", "training_args.bin", "model.gguf", "README.md", "run.py", "flax_model.msgpack"):
        (main / name).write_bytes(b"not wanted")
    ordered = random_model(Recipe(vocab_size=vocab_size(), act_order=True))
    branch = add_tokenizer(write_checkpoint(root / "branch", ordered, container="sharded"))
    return {"main": main, BRANCH: branch}


@pytest.fixture
def hub(checkpoints: dict[str, Path]) -> Iterator[Hub]:
    server = Hub(checkpoints)
    yield server
    server.shutdown()
    server.server_close()


def environment(home: Path, endpoint: str) -> dict[str, str]:
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return {**os.environ, **quiet, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_TOKEN": ""}


RESOLVE = """
import sys
from gptq_api.hub import HubError, local_model
try:
    print(local_model(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None))
except HubError as error:
    sys.exit(f"refused: {error}")
assert not {"torch", "transformers"} & set(sys.modules)
"""


def resolve(home: Path, endpoint: str, *args: str) -> tuple[Path | None, str]:
    """`local_model` in a process of its own, as the library reads its settings once: (folder, stderr)."""
    command = [sys.executable, "-c", RESOLVE, *args]
    env = environment(home, endpoint)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    return Path(done.stdout.strip()) if done.returncode == 0 else None, done.stderr


def refusal(home: Path, endpoint: str, *args: str) -> str:
    folder, err = resolve(home, endpoint, *args)
    assert folder is None and err.startswith("refused: ") and err.count("\n") == 1, err
    return err


def test_download_then_offline_then_a_branch(hub: Hub, tmp_path: Path) -> None:
    folder, err = resolve(tmp_path, hub.url, NAME)
    assert folder is not None, err
    assert f"{NAME} is no folder here: taking it from {hub.url}" in err
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in folder.iterdir()} == wanted == hub.downloaded

    hub.requests.clear()
    assert resolve(tmp_path, hub.url, NAME)[0] == folder and hub.downloaded == set()

    again, err = resolve(tmp_path, NOBODY, NAME)
    assert again == folder and f"using {NAME} as it was downloaded before" in err
    assert "it was not downloaded before" in refusal(tmp_path, NOBODY, NAME, BRANCH)

    branch, _ = resolve(tmp_path, hub.url, NAME, BRANCH)
    assert branch is not None and len(list(branch.glob("*.safetensors"))) == 3
    assert f"{NAME} has no revision gptq-8bit; it has main, {BRANCH}" in refusal(tmp_path, hub.url, NAME, "gptq-8bit")


def test_a_broken_connection_is_taken_up_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    whole = tmp_path / "big"
    whole.mkdir()
    (whole / "config.json").write_text("{}")
    (whole / "model.safetensors").write_bytes(os.urandom(2**20) * 24)
    hub.add("big", whole)
    hub.cut_after = 15 * 2**20
    folder, err = resolve(tmp_path / "home", hub.url, NAME, "big")
    assert folder is not None, err
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    # The library writes what it has in pieces of 10 MiB.
    assert hub.weight_ranges == [None, f"bytes={10 * 2**20}-"]


def complete(folder: Path) -> list[Path]:
    """The first and the last shard, as far as they are there; none while the folder changes under our eyes."""
    try:
        return list(folder.rglob("model-0000[13]*.safetensors"))
    except FileNotFoundError:
        return []


def test_a_killed_download_keeps_what_is_complete_and_is_not_taken_for_whole(hub: Hub, tmp_path: Path) -> None:
    hub.stalled = "model-00002-of-00003.safetensors"
    command = [sys.executable, "-c", RESOLVE, NAME, BRANCH]
    process = subprocess.Popen(command, env=environment(tmp_path, hub.url), stderr=subprocess.DEVNULL)
    wait_for(lambda: len(complete(tmp_path)) == 2, 30)
    process.kill()
    process.wait()
    hub.stalled = None
    assert "was not downloaded completely before" in refusal(tmp_path, NOBODY, NAME, BRANCH)
    hub.requests.clear()
    folder, err = resolve(tmp_path, hub.url, NAME, BRANCH)
    assert folder is not None, err
    assert {name for name in hub.downloaded if name.endswith(".safetensors")} == {"model-00002-of-00003.safetensors"}
    assert resolve(tmp_path, NOBODY, NAME, BRANCH)[0] == folder


def test_serving_by_name_tells_the_name_and_answers(hub: Hub, tmp_path: Path) -> None:
    flags = ("--model-path", NAME, "--device", "cpu", "--speculate", "auto", "--draft-model", NAME)
    with Server(*flags, env=environment(tmp_path, hub.url)) as server:
        assert "; draft model " in server.log()
        assert server.http.get("/v1/models").json()["data"][0]["id"] == NAME
        body = {"model": NAME, "prompt": "Hello", "max_tokens": 2}
        assert server.http.post("/v1/completions", json=body).status_code == 200


def test_pull_list_and_rm(hub: Hub, commands: Commands, tmp_path: Path) -> None:
    def command(home: Path, endpoint: str, *args: str) -> tuple[int, str, str]:
        done = commands.run(*args, env=environment(home, endpoint))
        return done.returncode, done.stdout, done.stderr

    status, out, _ = command(tmp_path, hub.url, "list")
    assert status == 0 and "no models in" in out and "gptq-api pull OWNER/NAME" in out
    status, out, err = command(tmp_path, hub.url, "pull", NAME)
    assert status == 0 and (Path(out.strip()) / "model.safetensors").is_file(), err
    assert command(tmp_path, hub.url, "pull", NAME, "--revision", BRANCH)[0] == 0
    status, out, _ = command(tmp_path, NOBODY, "list")
    head, *rows = out.splitlines()
    assert head.split() == ["MODEL", "REVISION", "WEIGHTS", "SIZE", "LAST", "USED"]
    assert [row.split()[:3] for row in rows] == [[NAME, BRANCH, "gptq"], [NAME, "main", "gptq"]]
    rows = json.loads(command(tmp_path, NOBODY, "list", "--json")[1])
    assert {row["revision"] for row in rows} == {"main", BRANCH} and all(row["size_bytes"] > 1000 for row in rows)
    assert command(tmp_path, NOBODY, "inspect", NAME, "--device", "cpu")[0] == 0

    status, _, err = command(tmp_path, NOBODY, "rm", NAME, "--revision", "v9")
    assert status == 1 and f"{NAME} has no revision v9" in err and f"it has {BRANCH}, main" in err
    status, out, _ = command(tmp_path, NOBODY, "rm", NAME, "--revision", BRANCH)
    assert status == 0 and "1 other revision of it stays" in out
    status, out, _ = command(tmp_path, NOBODY, "rm", NAME)
    assert status == 0 and out.startswith(f"removed {NAME}: ") and "stay" not in out
    status, _, err = command(tmp_path, NOBODY, "rm", NAME)
    assert status == 1 and "which holds no models" in err and err.count("\n") == 1
    status, _, err = command(tmp_path, hub.url, "pull", "demo")
    assert status == 1 and "demo is no name on the hub" in err and err.count("\n") == 1


def test_what_was_tried_is_said(hub: Hub, commands: Commands, tmp_path: Path) -> None:
    done = commands.run("serve", "modles/vicuna", env=environment(tmp_path, hub.url))
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert f"modles/vicuna is neither a folder here nor a model at {hub.url}" in done.stderr
    for typo in ("./models/vicuna", "models/vicuna/4bit", "vicuna", "models/vicuna.safetensors", "/models/vicuna", ""):
        assert not is_hub_name(typo)


def test_a_local_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("TheBloke/vicuna-7B-1.1-GPTQ")
    (tmp_path / "TheBloke" / "vicuna-7B-1.1-GPTQ").mkdir(parents=True)
    assert local_model("TheBloke/vicuna-7B-1.1-GPTQ") == "TheBloke/vicuna-7B-1.1-GPTQ"
    with pytest.raises(HubError, match="--revision main is for models on the hub"):
        local_model("TheBloke/vicuna-7B-1.1-GPTQ", "main")
    assert local_model("demo") == "demo"


BLOKE = ["a-4bit-128g.no-act-order.pt", "a-4bit-128g.safetensors", "config.json", "tokenizer.model", ".gitattributes"]


@pytest.mark.parametrize(
    ("files", "ckpt", "wanted"),
    [
        (BLOKE, None, {"a-4bit-128g.safetensors", "config.json", "tokenizer.model"}),
        (BLOKE, "a-4bit-128g.no-act-order.pt", {"a-4bit-128g.no-act-order.pt", "config.json", "tokenizer.model"}),
        (["llama.pt", "optimizer.pt", "training_args.bin"], None, {"llama.pt"}),
        (["model.safetensors", "original/consolidated.00.pth", "sub/model.safetensors"], None, {"model.safetensors"}),
        (["consolidated.safetensors", "model.safetensors"], None, {"model.safetensors"}),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
            None,
            {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"},
        ),
        (
            ["chat_template.jinja", "vocab.json", "m.bin", "evil.py"],
            None,
            {"m.bin", "chat_template.jinja", "vocab.json"},
        ),
    ],
)
def test_the_files_that_are_taken(files: list[str], ckpt: str | None, wanted: set[str]) -> None:
    assert set(choose_files("a/b", files, None if ckpt is None else Path(ckpt))) == wanted


@pytest.mark.parametrize(
    ("files", "ckpt", "words"),
    [
        (["a.safetensors", "b.safetensors"], None, r"several sets of weights \(a.safetensors, b.safetensors\)"),
        (["a.safetensors"], "b.pt", "--gptq-ckpt b.pt: a/b has no such weights file"),
        (["a.gguf"], None, "holds no weights .* but GGUF files"),
        (["model.safetensors.index.json"], None, "holds no weights"),
    ],
)
def test_what_cannot_be_chosen_is_refused(files: list[str], ckpt: str | None, words: str) -> None:
    with pytest.raises(HubError, match=words):
        choose_files("a/b", files, None if ckpt is None else Path(ckpt))
