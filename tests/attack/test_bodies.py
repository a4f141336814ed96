"""Thousands of bodies that are wrong in some way: each has an answer, none of them an error of ours."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import pytest

from tests.attack.bodies import Generator, faults, statuses
from tests.attack.client import ask_all
from tests.attack.clients import check_free
from tests.support.server import Server

SEED = 20261129
NO_EGRESS = """
import sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.exec", "pickle.find_class"):
        if "gptq_api" not in str(args) and "gptq_api" in " ".join(sys.orig_argv):
            print("AUDIT", event, args, file=sys.stderr, flush=True)
sys.addaudithook(hook)
"""
"""the log tells of everything that reaches out of a process"""


def attack(count: int, seed: int, env: dict[str, str]) -> None:
    with Server("--max-model-len", "128", "--log-json", env=env) as server:
        engine = server.engine_pid
        audited = server.log().count("AUDIT")
        document = server.http.get("/openapi.json").json()
        replies = asyncio.run(ask_all(server.port, Generator(document, random.Random(seed)).requests(count)))
        assert len(replies) == count
        wrong = faults(replies)
        assert not wrong, "\n".join([f"{len(wrong)} of {statuses(replies)}", *wrong[:10]])
        found = statuses(replies)
        assert found[200] > count / 100 and found[400] > count / 3, found
        check_free(server)
        assert server.engine_pid == engine and server.chat(max_tokens=2).status_code == 200
        assert "Traceback" not in server.log()
        assert server.log().count("AUDIT") == audited, "no body makes the server reach out"


def test_two_thousand_bodies(sitecustomize: Callable[[str], dict[str, str]]) -> None:
    attack(2000, SEED, sitecustomize(NO_EGRESS))


@pytest.mark.attack
@pytest.mark.timeout(1800)
def test_twenty_thousand_bodies(sitecustomize: Callable[[str], dict[str, str]]) -> None:
    attack(20_000, time.time_ns(), sitecustomize(NO_EGRESS))
