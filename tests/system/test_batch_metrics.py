"""What /metrics says of batches: while they are answered, when they have ended, and after the server was killed."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from tests.support.batches import client_of, count_to, counting, created, ended, jsonl, request
from tests.support.server import Server, wait_for

STATUSES = ("validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled")


def batches(server: Server) -> dict[str, float]:
    """By status, without those of which there is none."""
    found = {status: server.metric("gptq_api:batches", status=status) for status in STATUSES}
    return {status: num for status, num in found.items() if num}


def answered(server: Server, outcome: str) -> float:
    return server.metric("gptq_api:batch_requests_answered_total", outcome=outcome)


def unanswered(server: Server) -> float:
    return server.metric("gptq_api:batch_requests_running", "gptq_api:batch_requests_waiting")


def test_they_follow_a_batch_to_its_end_and_survive_a_kill(tmp_path: Path, slow_engine: None) -> None:
    flags = ("--batch-dir", str(tmp_path / "kept"), "--max-num-seqs", "2")
    with Server(*flags) as server:
        client = client_of(server)
        assert batches(server) == {} and unanswered(server) == 0
        lines = counting(3)
        lines[1]["body"]["temperature"] = "hot"
        assert ended(client, created(client, jsonl(lines))).status == "completed"
        assert ended(client, created(client, b"nonsense")).status == "failed"
        assert batches(server) == {"completed": 1, "failed": 1}
        assert (answered(server, "completed"), answered(server, "failed"), unanswered(server)) == (2, 1, 0)

        long = [request(f"{i}", count_to(2, max_tokens=900, ignore_eos=True)) for i in range(40)]
        batch = created(client, jsonl(long))
        wait_for(lambda: server.metric("gptq_api:batch_requests_running") == 2, 30)
        assert batches(server) == {"completed": 1, "failed": 1, "in_progress": 1}
        told = server.http.get("/metrics").text
        values = {
            name: float(value)
            for name, value in re.findall(r"^gptq_api:batch_requests_(\w+){[^\n]*} (\S+)$", told, re.MULTILINE)
            if name != "answered_total"
        }
        done = answered(server, "completed") - 2
        assert 38 - done <= values["waiting"] <= 38 and values["running"] <= 2
        server.process.send_signal(signal.SIGKILL)
        server.wait()
    with Server(*flags) as server:
        client = client_of(server)
        assert batches(server) == {"completed": 1, "failed": 1, "in_progress": 1}, "before anything else is asked"
        assert 0 < unanswered(server) <= 40 and answered(server, "failed") == 0
        client.batches.cancel(batch.id)
        ended(client, batch)
        assert batches(server) == {"completed": 1, "failed": 1, "cancelled": 1}
        wait_for(lambda: unanswered(server) == 0, 10)


def test_where_there_are_no_batches_nothing_is_said_of_them(server: Server) -> None:
    assert "gptq_api:batch" not in server.http.get("/metrics").text
