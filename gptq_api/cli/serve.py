"""`gptq-api serve`: the OpenAI surface over one checkpoint."""

from __future__ import annotations

from gptq_api.api import server
from gptq_api.config import Settings


def run(settings: Settings) -> int:
    """Serve until told to stop. Exit status: 0 drained, 1 could not start, 70 the engine died."""
    return server.run(settings)
