"""`gptq-api serve`: the OpenAI surface over one checkpoint."""

from __future__ import annotations

from gptq_api.api import server
from gptq_api.config import Settings


def run(settings: Settings) -> int:
    """Serve until told to stop. Returns one of `exits`; UserError where it cannot start."""
    return server.run(settings)
