"""Faults inside the engine, brought in from outside: one request fails where it is the fault of one, all of them where
it is not, and nobody is left waiting."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.attack.clients import check_free, events, text_of_stream
from tests.support.server import Server, alive, chat_body, wait_for

Env = Callable[[str], dict[str, str]]
IN_ENGINE = """
import os, random, sys, threading, time
if "gptq_api.engine.process" in sys.orig_argv:
"""
SICK = (
    IN_ENGINE
    + """
    import gptq_api.runner.cpu.native_sampler as sampler
    sample = sampler.sample
    def sick(logits, seats, masks=None):
        for row, seat in zip(logits, seats):
            if seat.num_output_tokens == 6:
                if seat.params.seed == 666:
                    row[:] = float("nan")
                elif seat.params.seed == 667:
                    row[5] = float("inf")
                elif seat.params.seed == 668:
                    row[7] = float("-inf")
        return sample(logits, seats, masks)
    sampler.sample = sick
"""
)
VICTIMS = [
    chat_body(f"Story {i}", max_tokens=24, seed=i, temperature=1 if i % 2 else 0, ignore_eos=True) for i in range(6)
]


def test_numbers_that_are_not_finite_end_one_sequence(sitecustomize: Env) -> None:
    """Its neighbours' texts are what they are without it, and its blocks are found by nobody."""
    with Server("--dtype", "float32", env=sitecustomize(SICK)) as server:

        async def together(*bodies: dict[str, Any]) -> list[str | BaseException]:
            found = (text_of_stream(server.port, body) for body in bodies)
            return await asyncio.gather(*found, return_exceptions=True)

        alone = [asyncio.run(text_of_stream(server.port, body)) for body in VICTIMS]
        sick = [{**VICTIMS[0], "seed": seed, "n": n} for seed, n in ((666, 1), (667, 1), (668, 1))]
        for _ in range(2):
            *texts, a, b, c = asyncio.run(together(*VICTIMS, *sick))
            assert texts == alone
            assert all("generation_failed" in str(error) for error in (a, b, c)), (a, b, c)
        assert asyncio.run(text_of_stream(server.port, VICTIMS[0])) == alone[0], "with what it left in the cache"
        assert server.metric("vllm:request_success_total", finished_reason="error") == 6
        check_free(server)


NO_MEMORY = (
    IN_ENGINE
    + """
    import torch
    from gptq_api.runner.cpu.runner import CpuRunner
    forward, rng, begun, count = CpuRunner._forward, random.Random(1), False, 0
    def scarce(self, step, seats):
        global begun, count
        begun = begun or any(new.params.seed == 999 for new in step.admitted)
        if begun and count < TIMES and rng.random() < 0.3:
            count += 1
            if count % 2:
                raise torch.OutOfMemoryError("injected")
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return forward(self, step, seats)
    CpuRunner._forward = scarce
"""
)


@pytest.mark.parametrize("times", [10, pytest.param(100, marks=[pytest.mark.attack, pytest.mark.timeout(600)])])
def test_no_memory_for_a_step(sitecustomize: Env, times: int) -> None:
    """A step that finds none is done again with less in it; texts stay what they are."""
    with Server("--dtype", "float32", env=sitecustomize(NO_MEMORY.replace("TIMES", str(times)))) as server:
        expected = [asyncio.run(text_of_stream(server.port, body)) for body in VICTIMS]
        server.chat(seed=999, max_tokens=1)  # from here on memory is scarce

        async def together() -> list[str | BaseException]:
            found = (text_of_stream(server.port, body) for body in VICTIMS)
            return await asyncio.gather(*found, return_exceptions=True)

        given_up = server.log().count("for a step of 1 tokens")  # of the one that began it
        while server.log().count("no memory on the device") < times:
            for text, whole in zip(asyncio.run(together()), expected, strict=True):
                if isinstance(text, BaseException):
                    given_up += 1
                    assert "generation_failed" in str(text)
                else:
                    assert text == whole
        assert given_up == server.log().count("for a step of 1 tokens"), "what was smaller was done again"
        assert server.http.get("/health").status_code == 200
        assert server.chat(max_tokens=2).status_code == 200
        check_free(server)


HANGS = (
    IN_ENGINE
    + """
    from gptq_api.runner.cpu.runner import CpuRunner
    launch = CpuRunner.launch
    def hang(self, step):
        launched = launch(self, step)
        if any(seat.params.seed == 666 and seat.num_output_tokens == 6 for seat in self._seats._seats.values()):
            time.sleep(10**6)
        return launched
    CpuRunner.launch = hang
"""
)


def test_a_step_that_hangs(sitecustomize: Env) -> None:
    with Server("--engine-timeout-s", "1", env=sitecustomize(HANGS)) as server:
        engine = server.engine_pid
        readers = [Reader(server, chat_body(f"Story {i}", ignore_eos=True, seed=i)) for i in range(3)]
        wait_for(lambda: all(len(reader.found) > 3 for reader in readers), 20)
        broken = server.chat(seed=666, ignore_eos=True)
        assert broken.status_code == 503 and broken.json()["error"]["code"] == "engine_stalled"
        for reader in readers:
            reader.join(5)
            assert "engine_stalled" in reader.found[-2] and reader.found[-1] == "[DONE]"
        assert server.http.get("/health").status_code == 503
        started = time.monotonic()
        server.signal(signal.SIGTERM)
        server.wait(10)
        assert time.monotonic() - started < 8
        wait_for(lambda: not alive(engine), 5)


BROKEN = (
    IN_ENGINE
    + """
    from gptq_api import frames
    import gptq_api.engine.wire as wire
    encode, count = wire.encode, 0
    def broken(message):
        global count
        data, count = encode(message), count + 1
        if count < 30:
            return data
        match %r:
            case "half a frame":
                os.write(int(sys.argv[-1]), data[: len(data) // 2])
                os._exit(0)
            case "half a frame, then silence":
                os.write(int(sys.argv[-1]), data[: len(data) // 2])
                time.sleep(10**6)
            case "a length of 4 GB":
                return bytes([255]) * 300
            case "no message":
                return frames.frame(bytes([193]) * 20)
            case "another message":
                return frames.frame(bytes([129, 164]) + b"type" + bytes([163]) + b"foo")
    wire.encode = broken
"""
)


RARER = ("a length of 4 GB", "half a frame, then silence", "no message", "another message")


@pytest.mark.parametrize("how", ["half a frame", *(pytest.param(how, marks=pytest.mark.attack) for how in RARER)])
def test_an_engine_that_ends_or_errs_in_the_middle_of_a_frame(sitecustomize: Env, how: str) -> None:
    stalls = how.endswith("silence")
    with Server("--engine-timeout-s", "1" if stalls else "60", env=sitecustomize(BROKEN % how)) as server:
        engine = server.engine_pid
        readers = [Reader(server, chat_body(f"Story {i}", ignore_eos=True)) for i in range(3)]
        for reader in readers:
            reader.join(15)
            assert ("engine_stalled" if stalls else "engine_dead") in reader.found[-2], reader.found[-2:]
            assert reader.found[-1] == "[DONE]"
        if stalls:
            assert server.http.get("/health").status_code == 503
        else:
            assert server.wait(10) == 70
            wait_for(lambda: not alive(engine), 5)


class Reader(threading.Thread):
    """Reads one stream to its end in the background."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.found: list[str] = []
        self._port, self._body = server.port, body
        self.start()

    def has_read(self, num: int) -> bool:
        return len(self.found) > num

    def text(self) -> str:
        chunks = [json.loads(event) for event in self.found if event != "[DONE]"]
        return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])

    def run(self) -> None:
        async def read() -> None:
            with contextlib.suppress(OSError, EOFError):
                async for event in events(self._port, self._body):
                    self.found.append(event)

        asyncio.run(read())


@pytest.mark.parametrize("deaths", [2, pytest.param(10, marks=[pytest.mark.attack, pytest.mark.timeout(600)])])
def test_deaths_of_the_engine_in_a_row(deaths: int) -> None:
    """With --restart-engine: streams are told, requests meanwhile are refused in words, and nothing is left behind."""
    count = chat_body("Count from one to ten.", max_tokens=16, temperature=0)
    with Server("--restart-engine", "20") as server:
        expected = server.post("/v1/chat/completions", count).json()["choices"]
        held = None
        for _ in range(deaths):
            reader = Reader(server, chat_body("Tell me a story.", ignore_eos=True))
            wait_for(partial(reader.has_read, 3), 20)
            os.kill(server.engine_pid, signal.SIGKILL)
            reader.join(5)
            assert "error" in reader.found[-2] and reader.found[-1] == "[DONE]"
            wait_for(lambda: server.http.get("/health").status_code == 200, 60)
            assert server.post("/v1/chat/completions", count).json()["choices"] == expected
            check_free(server)
            now = len(os.listdir(f"/proc/{server.process.pid}/fd"))
            assert held is None or now <= held
            held = now
        assert "Traceback" not in server.log()
