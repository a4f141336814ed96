"""API keys: any of them, as a bearer token or in x-api-key, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers


class Authenticator:
    """Knows the SHA-256 of the accepted keys, never the keys."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, headers: Headers) -> bytes | None:
        """The caller's id, which may be stored: 8 bytes derived from the key; empty where no key is configured. None
        where the key is missing or wrong. All keys are compared, whatever the first comparison said."""
        if not self._digests:
            return b""
        presented = {hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest() for key in _presented(headers)}
        found = {digest for digest in presented for known in self._digests if hmac.compare_digest(digest, known)}
        return hashlib.sha256(found.pop()).digest()[:8] if len(found) == 1 else None


def _presented(headers: Headers) -> list[str]:
    """At most one key of each header. Claude Code sends both, the second of them meant for somebody else; two that are
    known here are nobody's, since there is no guessing which one is meant."""
    bearer, plain = headers.getlist("authorization"), headers.getlist("x-api-key")
    if len(bearer) > 1 or len(plain) > 1:
        return []
    keys = [
        token.strip() for scheme, _, token in (line.partition(" ") for line in bearer) if scheme.lower() == "bearer"
    ]
    return keys + plain


def why_refused(headers: Headers) -> str:
    """What is wrong with the key of a request that `check` refused, a sentence without its period."""
    bearer, plain = headers.getlist("authorization"), headers.getlist("x-api-key")
    if len(bearer) + len(plain) > 1:
        return "More than one API key was sent"
    if not any((*bearer, *plain)):
        return "No API key was sent"
    if bearer and not bearer[0].lower().startswith("bearer "):
        return "The Authorization header holds no bearer token"
    return "Incorrect API key provided"
