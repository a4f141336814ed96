"""What is said to a request for a place that does not exist: the place that was meant, or why there is none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_ABSENT = {
    "embeddings": "This server generates text and computes no embeddings; ask a server with an embedding model.",
    "audio": "This server takes and generates text only.",
    "images": "This server takes and generates text only.",
    "moderations": "This server moderates nothing.",
    "rerank": "This server generates text and ranks no documents.",
    "score": "This server generates text and ranks no documents.",
    "files": "This server keeps no files: its setting --batch-dir says where it may.",
    "batches": "This server takes no batches: its setting --batch-dir says where it may keep them.",
    "fine_tuning": "This server trains nothing.",
    "assistants": "This server keeps no assistants; send the conversation to /v1/chat/completions.",
    "threads": "This server keeps no conversations; send them to /v1/chat/completions.",
    "edits": "This server has no edits; use /v1/chat/completions.",
    "realtime": "This server has no realtime sessions; /v1/chat/completions streams with 'stream': true.",
    "videos": "This server takes and generates text only.",
    "vector_stores": "This server keeps no files.",
    "uploads": "This server keeps no files.",
    "generate": "This is OpenAI's API; use /v1/completions or /v1/chat/completions.",
    "api": "What begins with /api is Ollama's; OpenAI's API is here: /v1/chat/completions, /v1/models.",
}
"""the first part of OpenAI's other places, below /v1 -> why they are not here. A 404 and no 501: clients try what ends
with a 5xx again"""


def unknown_url(method: str, path: str, known: Iterable[str]) -> tuple[str, str]:
    """(message, code). `known`: the paths that exist, up to the name that some hold."""
    shown = f"Unknown request URL: {method} {path[:200]}."
    if (meant := _meant(path, set(known))) is not None:
        hint = " With an SDK, the base URL ends in /v1 and nothing else." if meant.startswith("/v1/") else ""
        return f"{shown} Did you mean {meant}?{hint}", "unknown_url"
    for part in _parts(path.lower()):
        if part in _ABSENT:
            return f"{shown} {_ABSENT[part]}", "unsupported_endpoint"
    return f"{shown} The API begins with /v1; /docs and /openapi.json list all there is.", "unknown_url"


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part][:16]


def _meant(path: str, known: set[str]) -> str | None:
    """The longest end of the path that exists, below /v1 or not; else one that differs by a few letters."""
    parts = _parts(path)
    named = tuple(place for place in known if place.endswith("/"))
    ends = ["/".join(parts[start:]) for start in range(len(parts))]
    for end in ends:
        for place in (f"/{end}", f"/v1/{end}", f"/{end.lower()}"):
            if place in known or place.startswith(named):
                return place[:200]
    spelled = [f"/v1/{end.removeprefix('v1/')}" for end in ends[:1]] + [f"/{end}" for end in ends[:1]]
    close = [
        match for place in spelled for match in difflib.get_close_matches(place[:64], sorted(known - {*named}), 1, 0.88)
    ]
    return close[0] if close else None
