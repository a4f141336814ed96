"""Servers that several test files share: starting one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from server import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The demo model with default settings."""
    with Server() as running:
        yield running


@pytest.fixture(scope="session")
def strict_server() -> Iterator[Server]:
    """Small limits, short timeouts, two keys, JSON log."""
    with Server(
        *("--api-key", "first-key,second-key", "--strict-params", "--log-json", "--served-model-name", "strict"),
        *("--max-body-bytes", "100000", "--max-queued-requests", "4", "--max-num-seqs", "2"),
        *("--header-timeout-s", "1", "--body-timeout-s", "1", "--send-timeout-s", "1", "--sse-ping-s", "0.2"),
    ) as running:
        running.http.headers["authorization"] = "Bearer first-key"
        yield running
