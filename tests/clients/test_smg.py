"""Two servers behind smg, the gateway that docs/operations.md names: what is cached, who leaves, who dies."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from tests.clients import environments
from tests.support.gateway import Fleet, asked_with_prefixes, hit_share, prefixes, under_load


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(str(environments.folder("smg") / "bin" / "smg")) as running:
        yield running


pytestmark = pytest.mark.timeout(600)


def test_prompts_go_where_their_beginning_is_cached(fleet: Fleet) -> None:
    load = asked_with_prefixes(fleet.url, prefixes(4), 6)
    assert not load.failed and load.num == 24
    assert hit_share(load, 128) >= 0.95, load.by_prefix


def test_servers_are_restarted_one_after_the_other_and_no_request_fails(fleet: Fleet) -> None:
    done = threading.Event()
    statuses = list[int]()

    def restart() -> None:
        try:
            for place in range(2):
                statuses.append(fleet.stop(place))
                fleet.start(place)
        finally:
            done.set()

    thread = threading.Thread(target=restart)
    thread.start()
    load = under_load(fleet.url, lambda num: done.is_set())
    thread.join()
    assert statuses == [0, 0]
    assert load.num > 20 and not load.failed, load.failed[:5]


def test_a_server_that_is_killed_costs_at_most_what_it_was_answering(fleet: Fleet) -> None:
    users = 4
    killed = threading.Event()

    def until(num: int) -> bool:
        if num > 40 and not killed.is_set():
            killed.set()
            fleet.servers[0].signal(signal.SIGKILL)
        return num > 200

    load = under_load(fleet.url, until, users)
    assert len(load.failed) <= users, load.failed
    fleet.start(0)
    again = under_load(fleet.url, lambda num: num > 40)
    assert not again.failed
