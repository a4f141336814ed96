"""Packed weights that are kept from one start to the next: used when they are the checkpoint's, and only then."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_api.checkpoint.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from gptq_api.checkpoint.packing import pack_qweight
from gptq_api.runner.cpu import native, packed_cache, packed_file
from gptq_api.runner.cpu.packed_cache import PackedCache, RefusedError, cache_folder
from gptq_api.runner.cpu.packed_file import DamagedError, Packed, PackedFile, write
from gptq_api.runner.load import load_runner
from gptq_api.runner.options import LoadOptions
from gptq_api.runner.solo import Solo, step_of
from gptq_api.types import SamplingParams
from tests.support.checkpoints import Recipe, random_model, write_checkpoint

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.MISSING)
RECIPE = Recipe(hidden_size=96, num_heads=6, num_kv_heads=2, sym=False)
IDS = [3, 17, 40, 5, 60, 8, 9]


@pytest.fixture(autouse=True)
def small_models_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cache, "LEAST_BYTES", 0)
    monkeypatch.setattr(packed_cache, "SETTLED_S", -1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", random_model(RECIPE))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def written() -> None:
    """Wait for what is being written."""
    for thread in threading.enumerate():
        if thread.name == "packed-cache":
            thread.join(10)
            assert not thread.is_alive()


def logits(folder: Path, cache: Path | str, **more: Any) -> Tensor:
    options = LoadOptions(
        model_path=str(folder), device="cpu", num_threads=1, kv_cache_mib=4, packed_cache=str(cache), **more
    )
    runner: Any = load_runner(options)
    written()
    solo = Solo(list(IDS), SamplingParams(max_tokens=1, temperature=0), [0])
    found: Tensor = runner.logits(step_of([solo], [len(IDS)]), every_row=True)[0]
    return found


@contextmanager
def no_packing() -> Iterator[None]:
    def pack(*args: Any, **more: Any) -> None:
        raise AssertionError("a weight was packed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native.QuantizedWeight, "__init__", pack)
        yield


def files(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"act_order": True, "group_size": 16},
        {"act_order": True, "own_order": ("k_proj", "up_proj")},
        {"quantize_head": True, "attention_bias": True, "mlp_bias": True, "group_size": -1},
        {"mixed_bits": {"v_proj": 8, "gate_proj": 3, "down_proj": 2}},
        {"dense": ("o_proj", "up_proj")},
        {"family": "qwen3", "tie": True},
        {"family": "phi3"},
    ],
)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_second_load_packs_nothing_and_computes_the_same(
    more: dict[str, Any], dtype: str, tmp_path: Path, cache: Path
) -> None:
    recipe = Recipe(**{"hidden_size": 96, "num_heads": 6, "num_kv_heads": 2, "sym": False, **more})
    folder = write_checkpoint(tmp_path / "model", random_model(recipe))
    expected = logits(folder, "off", dtype=dtype)
    assert torch.equal(logits(folder, cache, dtype=dtype), expected)
    (kept,) = files(cache)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and stat.S_IMODE(cache.stat().st_mode) == 0o700
    before = kept.stat()
    with no_packing():
        assert torch.equal(logits(folder, cache, dtype=dtype), expected)
    assert kept.stat().st_mtime_ns == before.st_mtime_ns
    other = "float32" if dtype == "auto" else "auto"
    assert not torch.equal(logits(folder, cache, dtype=other), expected), "one layout serves both, and both compute"


@pytest.mark.parametrize("times", ["new", "set back"])
def test_a_changed_checkpoint_is_packed_again(times: str, folder: Path, cache: Path) -> None:
    first = logits(folder, cache)
    (file,) = folder.glob("*.safetensors")
    before = file.stat()
    other = random_model(Recipe(**{**RECIPE.__dict__, "seed": 1}))
    data = next(write_checkpoint(folder.parent / "other", other).glob("*.safetensors")).read_bytes()
    assert len(data) == before.st_size
    with file.open("r+b") as stream:
        stream.write(data)
    if times == "set back":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_mtime_ns == before.st_mtime_ns and file.stat().st_ino == before.st_ino
    expected = logits(folder, "off")
    assert not torch.equal(first, expected)
    assert torch.equal(logits(folder, cache), expected)
    assert len(files(cache)) == 1
    assert torch.equal(logits(folder, cache), expected)


def test_another_version_of_the_zero_points_is_packed_again(folder: Path, cache: Path) -> None:
    checkpoint = open_checkpoint(folder)
    key = PackedCache(cache, checkpoint, "a")._key
    other = Checkpoint(checkpoint.folder, checkpoint.store, checkpoint.config, checkpoint.modules, 2, ())
    assert len({key, PackedCache(cache, other, "a")._key, PackedCache(cache, checkpoint, "b")._key}) == 3


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, Any] = {
    "a bit of the weights": lambda file: flip(file, 4096 + 1000),
    "a bit of the table": lambda file: flip(file, -20),
    "a bit of the first page": lambda file: flip(file, 30),
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "nothing": lambda file: os.truncate(file, 0),
    "something else": lambda file: file.write_bytes(b"GGUF" * 5000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_told_of_and_made_again(
    damage: str, folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(folder, cache)
    (kept,) = files(cache)
    DAMAGE[damage](kept)
    caplog.clear()
    assert torch.equal(logits(folder, cache), expected)
    (told,) = [record.message for record in caplog.records if "damaged" in record.message]
    assert str(kept) in told
    caplog.clear()
    with no_packing():
        assert torch.equal(logits(folder, cache), expected)
    assert not caplog.records


def test_without_room_it_is_not_kept_and_a_line_says_so(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(folder, "off")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        assert torch.equal(logits(folder, cache), expected)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [r.message for r in caplog.records if "not kept" in r.message and "too large" in r.message]
    assert not files(cache)
    caplog.clear()
    monkeypatch.setattr(packed_cache, "_SPARE_BYTES", 2**62)
    monkeypatch.setattr(packed_cache, "_SPARE_PART", 1)
    assert torch.equal(logits(folder, cache), expected)
    assert [r.message for r in caplog.records if "has no room for" in r.message]
    assert not files(cache)


def test_what_others_may_write_is_not_used(folder: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = logits(folder, cache)
    (kept,) = files(cache)
    with no_packing():
        assert torch.equal(logits(folder, cache), expected)
    for path, mode, usual in ((cache, 0o770, 0o700), (cache, 0o707, 0o700), (kept, 0o620, 0o600)):
        path.chmod(mode)
        caplog.clear()
        with no_packing(), pytest.raises(AssertionError, match="a weight was packed"):
            logits(folder, cache)
        assert f"others may write to {path}; chmod go-w {path}" in caplog.text
        path.chmod(usual)
    elsewhere = cache.parent / "elsewhere"
    kept.rename(elsewhere)
    kept.symlink_to(elsewhere)
    with no_packing(), pytest.raises(AssertionError, match="a weight was packed"):
        logits(folder, cache)


def test_nothing_is_written_to_a_folder_of_others(folder: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    expected = logits(folder, "off")
    assert torch.equal(logits(folder, cache), expected)
    assert not files(cache) and "packed weights are not kept" in caplog.text
    if os.geteuid() == 0:
        cache.chmod(0o700)
        os.chown(cache, 4711, 4711)
        assert torch.equal(logits(folder, cache), expected)
        assert not files(cache) and "belongs to user 4711" in caplog.text
    cache.rmdir()
    cache.write_text("a file")
    assert torch.equal(logits(folder, cache), expected)
    assert "Not a directory" in caplog.text


def test_two_starts_at_once_keep_one_file(folder: Path, cache: Path) -> None:
    checkpoint = open_checkpoint(folder)
    caches = [PackedCache(cache, checkpoint, "a") for _ in range(4)]
    tensor = torch.arange(3_000_000, dtype=torch.int32)
    for each in caches:
        each.put("x", Packed({"q": tensor}, {"n": 1}))
    threads = [each.keep() for each in caches]
    for thread in threads:
        assert thread is not None
        thread.join(10)
    assert len(files(cache)) == 1
    packed = PackedCache(cache, checkpoint, "a").take("x")
    assert packed is not None and torch.equal(packed.tensors["q"], tensor) and packed.numbers == {"n": 1}


def test_off_and_small_and_new_ones_are_not_kept(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    logits(folder, "off")
    monkeypatch.setattr(packed_cache, "SETTLED_S", 3600)
    logits(folder, cache)
    monkeypatch.setattr(packed_cache, "SETTLED_S", -1)
    monkeypatch.setattr(packed_cache, "LEAST_BYTES", 64 * 2**20)
    logits(folder, cache)
    assert not cache.exists() or not files(cache)
    monkeypatch.setattr(packed_cache, "LEAST_BYTES", 0)
    logits(folder, "auto")
    assert len(files(cache / "gptq-api" / "packed")) == 1


def test_only_a_checkpoint_that_loaded_is_kept(tmp_path: Path, cache: Path) -> None:
    model = random_model(RECIPE)
    model.dense["lm_head.weight"][5, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds NaN"):
        logits(write_checkpoint(tmp_path / "model", model), cache)
    assert not cache.exists()


def test_files_of_checkpoints_that_are_gone_go(tmp_path: Path, cache: Path) -> None:
    model = random_model(RECIPE)
    first, second, third = (write_checkpoint(tmp_path / name / "model", model) for name in "abc")
    logits(first, cache)
    logits(second, cache)
    assert len(files(cache)) == 2
    (cache / "x.packed.unfinished").write_bytes(b"half")
    (cache / "README").write_bytes(b"of somebody")
    next(first.glob("*.safetensors")).unlink()
    logits(third, cache)
    assert [file.name[:6] for file in files(cache)] == ["README", "model-", "model-"]


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/anna")
    assert cache_folder("auto") == Path("/var/cache/anna/gptq-api/packed")
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder("auto") == Path("/home/anna/.cache/gptq-api/packed")
    assert cache_folder("~/packed") == Path("/home/anna/packed")
    assert cache_folder("off") is None


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    linears = {
        f"{dtype} {shape}": Packed({"q": torch.randint(0, 100, shape).to(dtype)}, {"bits": 4})
        for dtype in (torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.float32)
        for shape in ((0, 3), (1,), (5, 7), (1500, 1000))
    }
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    write(fd, "key", "source", linears)
    file = PackedFile(fd)
    assert (file.key, file.source) == ("key", "source")
    for name, packed in linears.items():
        found = file.read(name)
        assert found is not None and found.numbers == packed.numbers
        assert torch.equal(found.tensors["q"], packed.tensors["q"])
        assert found.tensors["q"].dtype == packed.tensors["q"].dtype
    assert file.read("none") is None
    os.pwrite(fd, b"x", os.fstat(fd).st_size - 3)
    with pytest.raises(DamagedError):
        PackedFile(fd)
    file.close()


def checksum(data: bytes | bytearray) -> int:
    """As ext/cpu/checksum.h describes it."""
    sums, top = list(range(1, 9)), 2**64 - 1

    def step(total: int, word: int) -> int:
        total = (total ^ word) * 0x9E3779B97F4A7C15 & top
        return total ^ total >> 32

    padded = data + bytes(64 - len(data) % 64)
    for at in range(0, len(padded), 8):
        sums[at // 8 % 8] = step(sums[at // 8 % 8], int.from_bytes(padded[at : at + 8], "little"))
    found = len(data)
    for each in sums:
        found = step(found, each)
    return found


@pytest.mark.parametrize("size", [0, 1, 7, 8, 63, 64, 65, 200])
def test_a_checksum_shows_every_bit(size: int) -> None:
    data = bytearray(random.Random(size).randbytes(size))
    expected = packed_file._checksum(data)
    assert expected == checksum(data)
    found = {expected, packed_file._checksum(data + b"\0")}
    for bit in range(8 * size):
        data[bit // 8] ^= 1 << bit % 8
        found.add(packed_file._checksum(data))
        data[bit // 8] ^= 1 << bit % 8
    assert len(found) == 8 * size + 2


def test_the_layout_has_a_name_of_its_own() -> None:
    """Where this fails because packing was changed, LAYOUT needs another word beside the digest."""
    digest = hashlib.blake2b(digest_size=8)
    for bits, in_order in ((4, True), (4, False), (3, False), (8, True)):
        k, n, groups = 96, 32, 6
        steps = torch.arange(k * n, dtype=torch.int32).view(k, n)
        g_idx = torch.arange(k, dtype=torch.int32) // 16 if in_order else torch.arange(k, dtype=torch.int32) % groups
        scales = (1 + torch.arange(groups * n).view(groups, n) / 256).half()
        zeros = (torch.arange(groups * n) % 2**bits).to(torch.uint8).view(groups, n)
        q = (steps * 7 % 2**bits).to(torch.uint8)
        tensors, numbers = native.QuantizedWeight(pack_qweight(q, bits), zeros, scales, g_idx, bits).packed()
        for part in sorted(tensors):
            digest.update(tensors[part].view(-1).view(torch.uint8).numpy().tobytes())
        digest.update(repr(sorted(numbers.items())).encode())
    assert (native.LAYOUT, digest.hexdigest()) == ("strips of 16, 1", "e4f8d3ac5d48ac19")


def test_a_refusal_is_an_error_with_a_remedy(cache: Path) -> None:
    cache.mkdir(mode=0o700)
    cache.chmod(0o720)
    with pytest.raises(RefusedError, match="chmod go-w"):
        packed_cache._private_folder(cache, make=True)
