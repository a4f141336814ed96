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
        digest = hashlib.sha256(_presented(headers).encode("utf-8", "surrogatepass")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return hashlib.sha256(digest).digest()[:8] if any(matches) else None


def _presented(headers: Headers) -> str:
    bearer, plain = headers.getlist("authorization"), headers.getlist("x-api-key")
    if len(bearer) + len(plain) != 1:  # two keys: no guessing which one is meant
        return ""
    if plain:
        return plain[0]
    scheme, _, token = bearer[0].partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


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
