"""Files that are there and cannot be read, or are not what they are called: a sentence that names the file, the reason
and the remedy."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptq_api.checkpoint.checkpoint import CheckpointError, open_checkpoint
from gptq_api.checkpoint.identity import identity
from gptq_api.model.config import read_config
from gptq_api.text.folder import checkpoint_folder
from gptq_api.text.tokenizer import TokenizerError, load_tokenizer
from tests.checkpoint.test_checkpoint import load, refused
from tests.support.checkpoints import RandomModel, Recipe, random_model, write_checkpoint
from tests.support.text_tokenizers import spm

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4030000000\n"
NOBODY = 65534


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return random_model(Recipe(num_layers=1))


@pytest.fixture
def folder(model: RandomModel) -> Iterator[Path]:
    """One that everybody may enter."""
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        folder = write_checkpoint(Path(path) / "model", model, quant_config={"bits": 4, "group_size": 32})
        yield for_everybody(folder)


def for_everybody(folder: Path) -> Path:
    for file in folder.iterdir():
        file.chmod(0o644)  # the library makes weights for their owner alone
    return folder


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """root reads everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def no_permission(file: Path) -> None:
    file.chmod(0)


def pointer(file: Path) -> None:
    file.write_bytes(POINTER)


def broken_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("../blobs/4d7a21")


SPOILED: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "permission": (no_permission, ("cannot be read: Permission denied", "let user")),
    "pointer": (pointer, ("git-lfs pointer", "git lfs pull")),
    "broken link": (broken_link, ("link to ../blobs/4d7a21", "not there", "download it again")),
}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "quantize_config.json"])
@pytest.mark.parametrize("how", SPOILED)
def test_a_file_that_cannot_be_read_is_told_as_that(name: str, how: str, folder: Path) -> None:
    spoil, words = SPOILED[how]
    spoil(folder / name)
    with unprivileged():
        refused(folder, str(folder / name), *words)
        identity(folder)  # which is taken before anything is opened


@pytest.mark.parametrize("how", SPOILED)
def test_pickles_and_shards_as_well(how: str, model: RandomModel, folder: Path) -> None:
    spoil, words = SPOILED[how]
    for container, name in (("pt", "llama-4bit-32g.pt"), ("sharded", "model-00002-of-00003.safetensors")):
        path = for_everybody(write_checkpoint(folder / container, model, container=container))
        spoil(path / name)
        with unprivileged():
            refused(path, str(path / name), *words)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("how", SPOILED)
def test_tokenizers_as_well(name: str, how: str, folder: Path) -> None:
    spm(folder)
    spoil, words = SPOILED[how]
    (folder / name).touch()
    spoil(folder / name)
    with unprivileged(), pytest.raises(TokenizerError) as caught:
        load_tokenizer(folder)
    assert all(word in str(caught.value) for word in (str(folder / name), *words))


def test_folders_that_cannot_be_entered(folder: Path) -> None:
    folder.chmod(0)
    with unprivileged():
        for path in (folder, folder / "model.safetensors"):
            refused(path, "cannot be read: Permission denied")
            with pytest.raises(Exception, match="Permission denied") as caught:
                checkpoint_folder(str(path))
            assert type(caught.value).__name__ == "FolderError"
    folder.chmod(0o755)
    (folder / "latest").symlink_to("nowhere")
    refused(folder / "latest", "latest is a link to nowhere, which is not there")
    refused(folder, "fifo.safetensors is no file", gptq_ckpt=_fifo(folder / "fifo.safetensors"))


def _fifo(path: Path) -> Path:
    os.mkfifo(path)  # to open it would be to wait for ever
    return path


def test_a_byte_order_mark_is_nothing(model: RandomModel, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, model, container="sharded", quant_config={"bits": 4, "group_size": 32})
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    spm(folder)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    for file in folder.glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load(folder).vocab_size == 96
    assert read_config(folder).eos_token_ids == (2, 3)
    assert open_checkpoint(folder).config.claim.bits == 4
    load_tokenizer(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe{\x00}\x00")
    refused(folder, "config.json is not valid JSON")


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


PICKLES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "code": (lambda f: torch.save({"a": _Evil()}, f), ("pickled code (posix.system)", ".safetensors")),
    "bare code": (lambda f: f.write_bytes(pickle.dumps(_Evil(), 2)), ("pickled code (posix.system)",)),
    "an array": (lambda f: torch.save({"a": np.ones(3)}, f), ("pickled code (numpy", "state_dict")),
    "a module": (lambda f: torch.save(torch.nn.Linear(2, 2), f), ("pickled code (torch.nn.modules.linear.Linear)",)),
    "protocol 4": (lambda f: f.write_bytes(pickle.dumps(_Evil(), 4)), ("its pickle is damaged, or not torch.save's",)),
    "garbage": (lambda f: f.write_bytes(b"\x80\x02garbage"), ("its pickle is damaged", "download it again")),
    "text": (lambda f: f.write_text("hello world"), ("not a readable torch file",)),
}


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.filterwarnings("error")
def test_torch_gives_no_advice_to_run_code(name: str, model: RandomModel, tmp_path: Path) -> None:
    write, words = PICKLES[name]
    file = write_checkpoint(tmp_path, model, container="pt") / "llama-4bit-32g.pt"
    write(file)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    message = str(caught.value)
    assert str(file) in message and all(word in message for word in words), message
    assert "weights_only" not in message and "PyTorch" not in message and "\x1b" not in message


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from gptq_api.checkpoint.checkpoint import CheckpointError
from gptq_api.runner.load import load_runner
from gptq_api.runner.options import LoadOptions
torch.set_num_threads(1)
load_runner(LoadOptions(model_path="demo", device="cpu", num_threads=1, kv_cache_mib=4))  # what is loaded lazily
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for folder in sys.argv[1:]:
    for room in (20, 60, 4000):
        resource.setrlimit(resource.RLIMIT_AS, (now + room * 2**20, resource.RLIM_INFINITY))
        try:
            load_runner(LoadOptions(model_path=folder, device="cpu", num_threads=1, kv_cache_mib=4))
            print("loaded")
        except CheckpointError as error:
            print(error)
"""


@pytest.mark.slow
def test_no_memory_names_the_file(tmp_path: Path) -> None:
    """The file cannot be mapped; it can, and what is read does not fit; it does."""
    recipe = Recipe(num_layers=1, hidden_size=512, intermediate_size=512, vocab_size=40_000, num_heads=8)
    model = random_model(recipe)
    folders = [write_checkpoint(tmp_path / c, model, container=c) for c in ("safetensors", "pt")]
    command = [sys.executable, "-c", MEMORY, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[2::3] == ["loaded", "loaded"], lines
    for folder, told in ((folders[0], lines[:2]), (folders[1], lines[3:5])):
        file = next(f for f in folder.iterdir() if f.suffix in (".safetensors", ".pt"))
        for line in told:
            assert line.startswith(str(file)) and "memory" in line and "download" not in line, line


@pytest.mark.parametrize("command", ["serve", "chat", "inspect"])
def test_a_path_without_weights_is_told_by_every_command(command: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    for path, words in {"empty": "holds no weights", "notes.txt": "is no weights file", "no": "does not exist"}.items():
        done = subprocess.run(
            [sys.executable, "-m", "gptq_api", command, str(tmp_path / path)],
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith(f"gptq-api {command}: {tmp_path / path} {words}"), done.stderr
        assert done.stderr.count("\n") == 1
