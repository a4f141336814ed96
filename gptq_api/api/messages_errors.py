"""Errors as clients of Anthropic's API expect them: `{"type": "error", "error": {"type", "message"}, "request_id"}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MESSAGES = "/v1/messages"
"""what the paths of that API begin with"""
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


def messages_status(status: int, code: str | None) -> int:
    """A full server is 529 there; 429 means a limit of the caller's own."""
    return 529 if code == "server_full" else status


def messages_error(status: int, error: Mapping[str, Any], request_id: str) -> dict[str, Any]:
    """`error`: as this server spells errors otherwise."""
    status = messages_status(status, error["code"])
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    message = error["message"]
    if error["code"] == "context_length_exceeded" and error["param"] != "max_tokens":
        # by these words clients know that a conversation has to be made shorter
        message = f"prompt is too long: {error['n_prompt_tokens']} tokens > {error['n_ctx'] - 1} maximum"
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
