"""One engine after the other, without a server: what another may be like, and how often there may be one."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_api.config import Settings
from gptq_api.demo import DEMO_PATH
from gptq_api.engine.client import EngineClient, EngineDead, Prompt
from gptq_api.engine.life import EngineFailed, EngineLost
from gptq_api.engine.restarts import Restarts
from gptq_api.types import SamplingParams

PROMPT = Prompt([5, 6, 7], [SamplingParams(max_tokens=4, temperature=0)])


@asynccontextmanager
async def engine(restarts: int, **settings: Any) -> AsyncIterator[EngineClient]:
    client = EngineClient(Settings(num_threads=1, **settings), restarts)
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


def pid_of(client: EngineClient) -> int:
    assert client._life is not None and client._life._process is not None
    return client._life._process.pid


async def until(probe: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not probe():
            await asyncio.sleep(0.01)


async def tokens(client: EngineClient) -> list[int]:
    with client.submit([PROMPT]) as generation:
        return [token async for deltas in generation for delta in deltas for token in delta.tokens]


async def test_one_that_dies_while_it_loads_again_is_one_more_death() -> None:
    async with engine(2) as client:
        expected = await tokens(client)
        first = pid_of(client)
        os.kill(first, signal.SIGKILL)
        await until(lambda: client.fault == "loading" and pid_of(client) != first)
        with pytest.raises(EngineDead), client.submit([PROMPT]):
            pass
        os.kill(pid_of(client), signal.SIGKILL)
        await until(lambda: client.num_restarts == 2)
        assert client.fault == "loading" and "while it loaded the model" in client.why_dead
        await until(lambda: client.fault is None)
        assert await tokens(client) == expected
        os.kill(pid_of(client), signal.SIGKILL)
        async with asyncio.timeout(10):
            await client.wait_dead()
        assert not client.alive and client.num_restarts == 2
        assert (
            client.why_dead
            == "the engine process was killed (SIGKILL, which the kernel sends where memory has run out)"
        )


@pytest.mark.parametrize("change", ["other weights", "no weights"])
async def test_a_model_that_has_changed_is_the_end(change: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO_PATH, model)
    async with engine(3, model_path=str(model)) as client:
        (weights,) = model.glob("*.safetensors")
        if change == "other weights":
            tensors = load_file(weights)
            tensors["model.norm.weight"] = torch.zeros_like(tensors["model.norm.weight"])
            save_file(tensors, weights, metadata={"format": "pt"})
        else:
            weights.unlink()
        os.kill(pid_of(client), signal.SIGKILL)
        async with asyncio.timeout(60):
            await client.wait_dead()
        sentence = "the engine came back with another model: its checkpoint was" if "other" in change else str(model)
        assert sentence in client.why_dead
        assert client.fault == "dead" and client.num_restarts == 1


async def test_one_that_hangs_while_it_loads_again_is_killed() -> None:
    async with engine(1, engine_timeout_s=1.0) as client:
        first, client._load_s = pid_of(client), 0.0
        os.kill(first, signal.SIGKILL)
        await until(lambda: client.fault == "loading" and pid_of(client) != first)
        second = pid_of(client)
        os.kill(second, signal.SIGSTOP)
        async with asyncio.timeout(20):
            await client.wait_dead()
        assert client.why_dead == "the engine process took more than 1 s to load the model"
        assert not Path(f"/proc/{second}").exists()


async def test_one_that_cannot_be_started_again_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with engine(2) as client:
        failures = [OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)), OSError(errno.EMFILE, os.strerror(errno.EMFILE))]
        monkeypatch.setattr("gptq_api.engine.life.socket.socketpair", Mock(side_effect=failures))
        os.kill(pid_of(client), signal.SIGKILL)
        async with asyncio.timeout(20):
            await client.wait_dead()
        assert client.why_dead == "the engine process cannot be started: Too many open files"
        assert client.num_restarts == 2


async def test_one_that_dies_while_it_loads_first_is_a_start_that_failed() -> None:
    client = EngineClient(Settings(), 3)
    starting = asyncio.ensure_future(client.start())
    await asyncio.sleep(0.2)
    os.kill(pid_of(client), signal.SIGKILL)
    with pytest.raises(EngineLost, match=r"was killed \(SIGKILL, .*\) while it loaded the model"):
        await starting
    assert client.fault == "dead" and client.num_restarts == 0


async def test_a_start_that_is_cancelled_leaves_no_process() -> None:
    client = EngineClient(Settings())
    starting = asyncio.ensure_future(client.start())
    await asyncio.sleep(0.2)
    pid = pid_of(client)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not Path(f"/proc/{pid}").exists()


async def test_what_goes_wrong_while_it_loads_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN_LOAD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    with pytest.raises(EngineFailed) as failure:
        await EngineClient(Settings()).start()
    assert str(failure.value) == "loading the model failed by a bug, told above: RuntimeError: injected"


BROKEN_LOAD = """
import sys
if "gptq_api.engine.process" in sys.orig_argv:
    import gptq_api.runner.load
    def broken(options):
        raise RuntimeError("injected\\nand more lines")
    gptq_api.runner.load.load_runner = broken
"""


def test_so_many_within_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("gptq_api.engine.restarts.time.monotonic", lambda: now)
    restarts = Restarts(2)
    assert restarts.take()
    now += 400
    assert restarts.take() and not restarts.take()
    now += 201
    assert restarts.take() and not restarts.take(), "the first is forgotten"
    now += 10_000
    restarts.end()
    assert not restarts.take()
    assert not Restarts(0).take()
