"""KV events: who reads them knows at every moment what the prefix cache holds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptq_api.engine import kv_events
from gptq_api.engine.kv_events import END, AllBlocksCleared, Event, EventBatch, KvEvents, KvEventsAt, Publisher
from gptq_api.errors import UserError
from gptq_api.scheduler.blocks import block_hash
from tests.engine.test_core import World
from tests.support.kv_reader import Index


def following(world: World, index: Index) -> KvEvents:
    """`index` reads what `world` publishes."""

    def publish(events: list[Event]) -> None:
        payload = msgspec.msgpack.encode(EventBatch(1.0, events, 0))
        index.take(index.next_number.to_bytes(8, "big"), payload)

    told = KvEvents(publish, world.blocks.block_size, "cpu")
    world.blocks.listener = told
    return told


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    lookahead=st.sampled_from([0, 1]),
    num_blocks=st.integers(2, 40),
    block_size=st.sampled_from([1, 2, 4]),
    budget=st.integers(1, 40),
    out_of_memory=st.sampled_from([0.0, 0.0, 0.3]),
    draft_rows=st.sampled_from([0, 4]),
    apart=st.booleans(),
)
@pytest.mark.slow
def test_a_reader_knows_what_is_cached(
    seed: int,
    lookahead: int,
    num_blocks: int,
    block_size: int,
    budget: int,
    out_of_memory: float,
    draft_rows: int,
    apart: bool,
) -> None:
    """After every step of random traffic: evictions, preemption, aborts, failed launches, numbers that are not finite,
    drafts."""
    rng = random.Random(seed)
    world = World(
        lookahead, num_blocks, block_size, 4, budget, out_of_memory=out_of_memory, draft_rows=draft_rows, apart=apart
    )
    index = Index()
    told = following(world, index)
    capacity = num_blocks * block_size
    stems = [[rng.randint(1, 7) for _ in range(capacity)] for _ in range(2)]
    alive: list[int] = []
    for _ in range(rng.randint(5, 60)):
        if rng.random() < 0.4:
            length = rng.randint(1, max(1, capacity // 2))
            prompt = rng.choice(stems)[: rng.randint(0, length)]
            prompt += [rng.randint(1, 7) for _ in range(length - len(prompt))]
            salt = rng.choice([b"", b"", b"key"])
            bias = {1: 1.0} if rng.random() < 0.3 else {}
            alive.append(world.add(prompt, salt, max_tokens=rng.randint(1, max(1, capacity - length)), logit_bias=bias))
        if alive and rng.random() < 0.05:
            gone = rng.choice(alive)
            if gone not in world.finished:
                world.abort(gone)
        if world.engine.has_work():
            world.step()
            told.flush()
            assert index.blocks.keys() == world.blocks.hashes
            for content, (parent, tokens) in index.blocks.items():
                behind = [parent] if parent is not None else [b"", b"key"]
                assert content in {block_hash(one, tokens) for one in behind if isinstance(one, bytes)}
    world.drain()
    told.flush()
    assert index.blocks.keys() == world.blocks.hashes
    told.end()
    assert not index.blocks


@pytest.fixture
def zmq() -> Any:
    return pytest.importorskip("zmq", reason="pyzmq is not installed: pip install 'gptq-api[events]'")


@pytest.fixture
def context(zmq: Any) -> Any:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def subscriber(zmq: Any, context: Any, endpoint: str, topic: bytes = b"") -> Any:
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.SUBSCRIBE, topic)
    socket.setsockopt(zmq.RCVTIMEO, 20_000)
    socket.connect(endpoint)
    return socket


def asked(zmq: Any, context: Any, endpoint: str, first: int) -> list[tuple[int, bytes]]:
    """What is sent again from number `first` on."""
    found: list[tuple[int, bytes]] = []
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.RCVTIMEO, 20_000)
    socket.connect(endpoint)
    socket.send_multipart((b"", first.to_bytes(8, "big")))
    while True:
        empty, number, payload = socket.recv_multipart()
        assert empty == b""
        if number == END:
            socket.close()
            return found
        found.append((int.from_bytes(number, "big"), payload))


def test_what_was_missed_is_sent_again(zmq: Any, context: Any, tmp_path: Path) -> None:
    events, replay = f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"
    publisher = Publisher(KvEventsAt(events, replay, "kv@here@demo"))
    told = KvEvents(publisher.publish, 2, "cuda:0")
    told.stored([b"a" * 16, b"b" * 16], None, [1, 2, 3, 4])
    told.removed(b"a" * 16)
    told.flush()
    told.flush()  # nothing is no batch
    index = Index()
    for number, payload in asked(zmq, context, replay, 0):
        index.take(number.to_bytes(8, "big"), payload)
    assert index.blocks == {b"b" * 16: (b"a" * 16, (3, 4))} and index.next_number == 2
    late = subscriber(zmq, context, events, b"kv@here@")
    while not late.poll(20):  # joining takes a moment
        told.stored([b"%016d" % index.next_number], None, [5, 6])
        told.flush()
        index.next_number += 1
    topic, number, payload = late.recv_multipart()
    assert topic == b"kv@here@demo"
    seen = int.from_bytes(number, "big")
    assert asked(zmq, context, replay, seen)[0] == (seen, payload)
    assert asked(zmq, context, replay, 10**6) == []
    publisher.close()


def test_a_full_queue_costs_batches_and_is_counted(
    zmq: Any, context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "MOST_QUEUED", 0)
    replay = f"ipc://{tmp_path}/replay"
    publisher = Publisher(KvEventsAt(f"ipc://{tmp_path}/events", replay, None))
    publisher.publish([AllBlocksCleared()])
    monkeypatch.undo()
    publisher.publish([AllBlocksCleared()])
    assert publisher.num_dropped == 1
    (number, _), *_ = asked(zmq, context, replay, 0)
    assert number == 1, "what is dropped is a gap"
    publisher.close()


def test_requests_that_are_none_are_passed_over(zmq: Any, context: Any, tmp_path: Path) -> None:
    replay = f"ipc://{tmp_path}/replay"
    publisher = Publisher(KvEventsAt(f"ipc://{tmp_path}/events", replay, None))
    nobody = context.socket(zmq.DEALER)
    nobody.connect(replay)
    for frames in ([b""], [b"", b""], [b"x", b"\0" * 8], [b"", b"\0" * 9], [b""] * 5):
        nobody.send_multipart(frames)
    publisher.publish([AllBlocksCleared()])
    assert [number for number, _ in asked(zmq, context, replay, 0)] == [0]
    assert not nobody.poll(0)
    publisher.close()


def test_addresses_that_cannot_be_had(zmq: Any, context: Any, tmp_path: Path) -> None:
    taken = context.socket(zmq.PUB)
    port = taken.bind_to_random_port("tcp://127.0.0.1")
    with pytest.raises(UserError, match=f"--kv-events tcp://127.0.0.1:{port} is in use"):
        Publisher(KvEventsAt(f"tcp://127.0.0.1:{port}", None, None))
    with pytest.raises(UserError, match=f"--kv-events-replay tcp://127.0.0.1:{port} is in use"):
        Publisher(KvEventsAt(f"ipc://{tmp_path}/events", f"tcp://127.0.0.1:{port}", None))
    with pytest.raises(UserError, match=r"--kv-events-replay tcp://192\.0\.2\.1:5558 cannot be listened on"):
        Publisher(KvEventsAt(f"ipc://{tmp_path}/events", "tcp://192.0.2.1:5558", None))
    with pytest.raises(UserError, match="--kv-events ipc:///no/such/folder/events cannot be listened on"):
        Publisher(KvEventsAt("ipc:///no/such/folder/events", None, None))
    Publisher(KvEventsAt("tcp://192.0.2.1:5557", None, None)).close()  # another machine's, which may come
